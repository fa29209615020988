"""A conversion with its progress shown, and what ``ca2st shard build`` prints before it (a dry run) or after it."""

from collections.abc import Mapping
from pathlib import Path

from ca2st.durable import NO_FAULTS, FaultPoints
from ray_jobs.console import counted, print_json, progress, result, table
from sharding.conversion import ConversionProgress, ConversionReport, OpenPool, convert
from sharding.datasets.label_spaces import label_histogram
from sharding.settings import ConversionConfig, estimate_storage
from sharding.source import SourceList


def convert_shown(
    source: SourceList,
    out: Path,
    config: ConversionConfig,
    *,
    faults: FaultPoints = NO_FAULTS,
    pool: OpenPool | None = None,
) -> ConversionReport:
    """Run `sharding.conversion.convert` with a progress bar; raises as it does."""
    with progress(f"Converting {source.dataset}/{source.split}", len(source.samples)) as update:
        return convert(
            source,
            out,
            config,
            faults=faults,
            pool=pool,
            progress=lambda state: update(state.num_done, _note(state)),
        )


def _note(state: ConversionProgress) -> str:
    rejected = f"  {state.num_rejected} rejected" if state.num_rejected else ""
    return f"{state.clips_per_second:.1f} clips/s{rejected}"


def print_plan(source: SourceList, config: ConversionConfig, *, as_json: bool) -> None:
    """Print the samples, classes and bytes to expect."""
    estimate = estimate_storage(source, config)
    facts: dict[str, object] = {
        "dataset": source.dataset,
        "split": source.split,
        "manifest": None,
        "num_samples": len(source.samples),
        "num_classes": _class_count(source.num_classes),
        "num_shards": estimate.num_shards,
        "estimated_bytes": estimate.total_bytes,
        "rejected": {},
        "notes": {kind: len(places) for kind, places in source.notes.items()},
        "clips_per_second": None,
    }
    histogram = label_histogram(source)
    if as_json:
        print_json(facts | {"samples_per_class": histogram})
        return
    empty = {space: sum(count == 0 for count in counts.values()) for space, counts in histogram.items()}
    facts["notes"] = counted({kind: len(places) for kind, places in source.notes.items()})
    facts["classes without samples"] = counted(empty)
    result(table({name: value for name, value in facts.items() if value is not None}))


def print_report(report: ConversionReport, *, as_json: bool) -> None:
    """Print what a finished conversion made, and what it left out."""
    facts = {
        "manifest": str(report.manifest_path),
        "num_samples": report.num_samples,
        "num_classes": _class_count(report.num_classes),
        "num_shards": report.num_shards,
        "rejected": dict(report.rejected),
        "notes": dict(report.notes),
        "clips_per_second": round(report.clips_per_second, 2),
    }
    if as_json:
        print_json(facts)
        return
    result(table(facts | {"rejected": counted(report.rejected), "notes": counted(report.notes)}))


def _class_count(num_classes: Mapping[str, int]) -> int | dict[str, int]:
    """Return one number where one label is learned, a number per target otherwise."""
    return next(iter(num_classes.values())) if len(num_classes) == 1 else dict(num_classes)
