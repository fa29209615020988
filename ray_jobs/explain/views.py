"""What one direction of cross-attention looks like on the page: a colour range, and a panel for every layer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from einops import rearrange
from numpy.typing import NDArray

from ca2st.model.attention_maps import AttentionMap
from ca2st.model.structure import Direction
from ray_jobs.explain.pictures import colour_range, heat_png, levels, times, times_even, to_base64
from ray_jobs.explain.places import Places
from ray_jobs.pages.axes import Tick

_SEES = {
    (
        "time",
        False,
    ): "A query sees its own place in every frame, so a frame's colours say when its places were looked at.",
    ("space", False): "A query sees every place of its own frame, so time plays no part here.",
    ("space_time", False): "A query sees every place of every frame.",
    ("space_time", True): "A query sees the whole spectrogram.",
}
_NEARLY_EVEN = math.log2(1.05)


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """Query times (down) by key times (to the right)."""

    picture: str
    """Data URI, one pixel a cell."""
    query_ticks: list[Tick]
    key_ticks: list[Tick]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPanel:
    """One layer of one direction."""

    layer: int
    bits: float
    share: float
    heats: list[str]
    """Attention received, as data URIs: one a frame for visual keys, one for a spectrogram."""
    strongest: str
    """The key with the most attention, in words."""
    matrix: Matrix | None
    """None where every query sees its own frame alone."""
    rows: int
    """Of a picture of attention."""
    columns: int
    levels: str
    """Base64 of the levels by query time, key picture, row and column, for the page's own script; empty without a
    matrix to choose a time from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DirectionView:
    """One direction in all of its layers."""

    direction: Direction
    panels: list[LayerPanel]
    sees: str
    """What a query sees, as a sentence."""
    most: str
    """What the fullest colours stand for, such as ``4×``."""
    least: str
    matrix_most: str
    """The same for the matrices of times, which are means over places and so paler."""
    query_labels: list[str]
    """The time of each query time."""

    @property
    def name(self) -> str:
        """T2S, ..."""
        return self.direction.name.upper()

    @property
    def hears(self) -> bool:
        """Whether the keys are sounds."""
        return self.direction.keys == "audio"


def direction_views(maps: Sequence[AttentionMap], places: Places) -> list[DirectionView]:
    """A view of each direction, in the order in which the model's last layer computes them."""
    names = dict.fromkeys(found.direction.name for found in sorted(maps, key=lambda found: -found.layer))
    return [_view([found for found in maps if found.direction.name == name], places) for name in names]


def _view(maps: Sequence[AttentionMap], places: Places) -> DirectionView:
    direction = maps[0].direction
    received = [times_even(_share(found), num_keys=_share(found).size) for found in maps]
    by_time = [times_even(found.by_time[0].numpy(), num_keys=found.by_time.shape[-1]) for found in maps]
    limit, matrix_limit = colour_range(received), colour_range(by_time)
    return DirectionView(
        direction=direction,
        panels=[
            _panel(found, places, limit=limit, received=one, matrix=_matrix(found, places, other, limit=matrix_limit))
            for found, one, other in zip(maps, received, by_time, strict=True)
        ],
        sees=_SEES[direction.window, direction.keys == "audio"],
        most=times(limit),
        least=times(-limit),
        matrix_most=times(matrix_limit),
        query_labels=places.time_labels(direction.queries),
    )


def _share(found: AttentionMap) -> NDArray[np.float32]:
    share: NDArray[np.float32] = found.received[0].numpy()
    return share


def _panel(
    found: AttentionMap,
    places: Places,
    *,
    limit: float,
    received: NDArray[np.float32],
    matrix: Matrix | None,
) -> LayerPanel:
    keys = found.direction.keys
    given = times_even(found.given[0].numpy(), num_keys=received.size)
    pictures = pictures_of(received, keys)
    return LayerPanel(
        layer=found.layer,
        bits=float(found.entropy_bits[0]),
        share=float(found.entropy_share[0]),
        heats=[heat_png(levels(picture, limit)) for picture in pictures],
        strongest=_strongest(received, keys, places),
        matrix=matrix,
        rows=pictures.shape[1],
        columns=pictures.shape[2],
        levels=to_base64(levels(np.stack([pictures_of(one, keys) for one in given]), limit)) if matrix else "",
    )


def _matrix(found: AttentionMap, places: Places, by_time: NDArray[np.float32], *, limit: float) -> Matrix | None:
    """None where every query sees its own frame alone."""
    if found.direction.window == "space":
        return None
    return Matrix(
        picture=heat_png(levels(by_time, limit)),
        query_ticks=places.ticks(found.direction.queries),
        key_ticks=places.ticks(found.direction.keys),
    )


def pictures_of(cells: NDArray[np.float32], keys: str) -> NDArray[np.float32]:
    """[key_times, key_places] as [pictures, rows, columns]: a square a frame, or one spectrogram, low tones below."""
    if keys == "audio":
        return rearrange(cells, "t f -> 1 f t")[:, ::-1]
    return rearrange(cells, "t (h w) -> t h w", h=math.isqrt(cells.shape[1]))


def _strongest(received: NDArray[np.float32], keys: str, places: Places) -> str:
    if received.max() < _NEARLY_EVEN:
        return "no key stands out: each gets about the even share"
    time, place = np.unravel_index(int(received.argmax()), received.shape)
    where = places.key_in_words(keys, int(time), int(place), num_places=received.shape[1])
    return f"{where}: {times(float(received.max()))} the even share"
