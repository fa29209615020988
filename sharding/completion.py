"""The end of a conversion: rejects held against the budget, the manifest, written last, and the report."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ca2st.durable import FaultPoints, write_bytes
from sharding.conversion import ConversionConfig, RejectBudget
from sharding.errors import AllRejectedError, RejectBudgetError
from sharding.notes import refuse_doubtful
from sharding.rejects import REJECTS_NAME, Reject, count_by_reason, rejects_file, rejects_in_words
from sharding.resume import DoneShard
from sharding.shard_set import write_shard_set
from sharding.source import SourceList


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionReport:
    """What a finished conversion made."""

    manifest_path: Path
    num_classes: Mapping[str, int]
    """Classes by target."""
    num_samples: int
    num_shards: int
    num_with_audio: int
    rejected: Mapping[str, int]
    """Rejected sources by reason."""
    notes: Mapping[str, int]
    """What was unusual about the sources and accepted, by kind: of their list and of the clips."""
    clips_per_second: float
    """Clips converted in this run by its wall time; 0 when there was nothing left to do."""


def require_within_budget(rejects: Sequence[Reject], source: SourceList, *, budget: RejectBudget, out: Path) -> None:
    """Refuse a set with too many rejects, and list them in ``rejects.jsonl``.

    Raises:
        AllRejectedError: there is nothing but rejects.
        RejectBudgetError: there are more than `budget` allows.
    """
    total = len(source.samples)
    if len(rejects) == total:
        (out / REJECTS_NAME).unlink(missing_ok=True)
        raise AllRejectedError(
            f"all {total} samples were rejected, nothing was written: {rejects_in_words(rejects, source)}",
            rejects=tuple(rejects),
        )
    if not budget.allows(len(rejects), total):
        write_bytes(out / REJECTS_NAME, rejects_file(rejects))
        raise RejectBudgetError(
            f"{len(rejects)} of {total} samples rejected, --max-rejects allows {budget}: "
            f"{rejects_in_words(rejects, source)}; all are listed in {out / REJECTS_NAME}; "
            "repair them and rerun (finished shards are kept), or raise --max-rejects"
        )


def count_notes(source: SourceList, shards: Sequence[DoneShard]) -> dict[str, int]:
    """Return how often each kind of note was made about the source list and the clips."""
    counts = Counter({kind: len(places) for kind, places in source.notes.items()})
    for shard in shards:
        counts.update(shard.notes)
    return dict(sorted(counts.items()))


def check_notes(
    source: SourceList,
    config: ConversionConfig,
    shards: Sequence[DoneShard] = (),
    examples: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Refuse notes that question the data where `config.strict`: of the source list, and of the clips in `shards`.

    Raises:
        UserInputError: naming kinds, counts and examples; `examples` are ids of clips by kind.
    """
    if config.strict:
        kept = " (finished shards are kept, and a rerun goes on from them)" if shards else ""
        rest = f"correct or remove them, or leave --strict out{kept}"
        refuse_doubtful(count_notes(source, shards), {**(examples or {}), **source.notes}, rest=rest)


def write_manifest(
    out: Path,
    shards: Sequence[DoneShard],
    rejects: Sequence[Reject],
    *,
    source: SourceList,
    config: ConversionConfig,
    tool_versions: Mapping[str, str],
    faults: FaultPoints,
) -> None:
    """Write ``rejects.jsonl`` where there are rejects, the shard table and the manifest."""
    if rejects:
        write_bytes(out / REJECTS_NAME, rejects_file(rejects))
    else:
        (out / REJECTS_NAME).unlink(missing_ok=True)
    fields = {
        "dataset": source.dataset,
        "split": source.split,
        "label_spaces": source.label_spaces,
        "targets": source.targets,
        "audio": config.audio,
        "video": config.video,
        "tool_versions": tool_versions,
        "source_list_sha256": source.sha256,
        "rejected": count_by_reason(rejects),
        "clock": config.clock,
        "notes": count_notes(source, shards),
    }
    write_shard_set(out, fields, tuple(shard.entry for shard in shards), faults=faults)
