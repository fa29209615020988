"""A conversion with its progress shown."""

from pathlib import Path

from ca2st.durable import NO_FAULTS, FaultPoints
from ray_jobs.console import progress
from sharding.conversion import ConversionConfig
from sharding.convert import ConversionProgress, ConversionReport, convert
from sharding.source import SourceList


def convert_shown(
    source: SourceList, out: Path, config: ConversionConfig, *, faults: FaultPoints = NO_FAULTS
) -> ConversionReport:
    """`sharding.convert.convert` with a progress bar; raises as it does."""
    with progress(f"Converting {source.dataset}/{source.split}", len(source.samples)) as update:
        return convert(source, out, config, faults=faults, progress=lambda state: update(state.num_done, _note(state)))


def _note(state: ConversionProgress) -> str:
    rejected = f"  {state.num_rejected} rejected" if state.num_rejected else ""
    return f"{state.clips_per_second:.1f} clips/s{rejected}"
