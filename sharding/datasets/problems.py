"""Everything wrong with an annotation file, gathered before anything is refused: all rows are named at once."""

from collections import Counter

from sharding.errors import AnnotationError

_MAX_LISTED = 20


class Problems:
    """Collects what is wrong; `refuse_any` raises one error that lists it.

    Args:
        source: What is being read, for the message: a path.
        advice: What to do about it.
    """

    def __init__(self, source: object, *, advice: str = "correct it and run again") -> None:
        self._source, self._advice = source, advice
        self._listed: list[str] = []
        self._kinds: Counter[str] = Counter()

    def __len__(self) -> int:
        return sum(self._kinds.values())

    def add(self, kind: str, message: str) -> None:
        """Note one problem; `kind` is what it is counted under, `message` starts with where it is."""
        self._kinds[kind] += 1
        if len(self._listed) < _MAX_LISTED:
            self._listed.append(message)

    def refuse_any(self) -> None:
        """Do nothing when nothing is wrong.

        Raises:
            AnnotationError: what is wrong, where (at most 20 places) and how often by kind; one line for one problem.
        """
        if not self._kinds:
            return
        if len(self) == 1:
            raise AnnotationError(f"{self._listed[0]}; {self._advice}")
        counts = ", ".join(f"{kind} {count}" for kind, count in self._kinds.most_common())
        more = [f"... and {len(self) - len(self._listed)} more"] if len(self) > len(self._listed) else []
        heading = f"{self._source}: {len(self)} problems ({counts}); {self._advice}:"
        raise AnnotationError("\n  ".join([heading, *self._listed, *more]))
