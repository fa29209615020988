"""Notes: what was unusual about a source list or its clips and was accepted, counted by kind, never passed over.

Most kinds question the data: somebody should look, and ``--strict`` refuses them. `HARMLESS` names those that only say
how a clip was converted to what players show.
"""

from collections.abc import Iterator, Mapping, Sequence

from ca2st.errors import UserInputError

LOOK_ALIKE = "labels that look alike"
SEVERAL_LABELS = "labels that may be several"
INVISIBLE = "labels with invisible characters"
MISSING_LABELS = "labels that may be missing values"
ONE_CLASS = "class alone"
LEFT_ASIDE = "files left aside"
EMPTY_FOLDERS = "class folders without videos"
UNUSED_CLASSES = "classes without samples"
SILENT_SOUND = "silent sound"
"""A clip whose sound is digital silence: it counts as one without sound."""
HARMLESS = frozenset(
    {
        UNUSED_CLASSES,
        "deinterlaced",
        "interlaced, kept",
        "large picture without a colour matrix, taken for BT.601",
        "mirrored",
        "one of several pictures",
        "one of several sound tracks",
        "picture starts late",
        "tone-mapped",
        "wide gamut converted",
    }
)
"""Kinds that question nothing; a kind that is not named here does."""
_MOST_NAMED = 5


def doubtful(notes: Mapping[str, int]) -> dict[str, int]:
    """Return the notes that question the data."""
    return {kind: count for kind, count in notes.items() if kind not in HARMLESS and count}


def refuse_doubtful(notes: Mapping[str, int], examples: Mapping[str, Sequence[str]], *, rest: str) -> None:
    """Refuse notes that question the data, as ``--strict`` asks for; `examples` by kind, `rest` says what to do else.

    Raises:
        UserInputError: naming kinds, counts and the first of the examples.
    """
    if found := doubtful(notes):
        told = "; ".join(f"{count} {kind}{_examples(examples.get(kind, ()), count)}" for kind, count in found.items())
        raise UserInputError(f"--strict: expected nothing that questions the data, found {told}; {rest}")


def note_lines(notes: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield a line for each kind of note of a source list, with its first examples."""
    for kind, places in notes.items():
        yield f"{'note' if kind in HARMLESS else 'warning'}: {len(places)} {kind}{_examples(places, len(places))}"


def _examples(places: Sequence[str], count: int) -> str:
    named = list(places[:_MOST_NAMED])
    more = [f"and {count - len(named)} more"] if named and count > len(named) else []
    return f" ({', '.join(named + more)})" if named else ""
