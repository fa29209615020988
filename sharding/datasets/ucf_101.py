"""``ucf_101``: the owners' lists ``trainlist01.txt`` and ``testlist01.txt``, of three splits.

The class of a video is the folder that the list names; the numbers behind it, where there are any, must agree with
``classInd.txt``. About half of the videos have no sound: ``--audio required`` with ``--max-rejects`` drops them.
"""

import re
from collections.abc import Callable

from sharding.datasets.label_spaces import class_name, published_classes
from sharding.datasets.media_tree import Annotation, located
from sharding.datasets.request import DatasetRequest, needed_annotations
from sharding.datasets.table import CellError, Problems, Row, matching, numbered_lines
from sharding.format.shard_set import LabelSpace
from sharding.source import SourceList

_video = matching(
    r"(?:(?P<folder>[A-Za-z]+)/)?(?P<name>v_(?P<action>[A-Za-z]+)_g\d\d_c\d\d)(?:\.\w{2,5})?",
    "not a video",
    "a video as ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi",
)


def read(request: DatasetRequest, dataset: str) -> SourceList:
    """Read one list: ``Class/v_X.avi``, ``Class/v_X.avi 1`` or ``v_X,1``, with numbers from 1."""
    annotations = needed_annotations(request, dataset, what="the owners' trainlist01.txt or testlist01.txt")
    classes = published_classes(dataset)
    problems = Problems(annotations, advice="is this the owners' file? fetch it again")
    parse = class_name(classes)
    found = []
    for number, line in numbered_lines(annotations):
        cells = tuple(re.split(r"[\s,]+", line.strip()))[:2]
        row = Row(
            path=annotations,
            line=number,
            text=line,
            columns=("video", "label")[: len(cells)],
            cells=cells,
            problems=problems,
        )
        if (one := _annotation(row, classes, parse)) is not None:
            found.append(one)
    problems.refuse_any()
    return located(
        found,
        request,
        dataset=dataset,
        spaces=[LabelSpace(name="label", classes=classes)],
        what="the folder with <class>/v_<name>.avi",
        suffix=".avi",
    )


def _annotation(row: Row, classes: tuple[str, ...], parse: Callable[[str], int]) -> Annotation | None:
    match = row.read("video", _video)
    if match is None:
        return None
    action = match["action"]
    # A file name may spell its class otherwise than the list (HandStandPushups).
    named = match["folder"] or next((name for name in classes if name.lower() == action.lower()), action)
    try:
        label = parse(named)
    except CellError as error:
        row.problems.add(error.kind, f"{row.place('video')}: expected {error.expected}, found {named!r}")
        return None
    if row.get("label") not in ("", str(label + 1)):
        found = f"{label + 1}, the number of {named!r}, found {row['label']!r}"
        row.problems.add("class and number differ", f"{row.where}: expected {found}")
    name = match["name"]
    return Annotation(sample_id=f"{named}/{name}", labels=(label,), where=row.where, clips=(name,), folder=named)
