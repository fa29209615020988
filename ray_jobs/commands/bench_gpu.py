"""``ca2st bench gpu``: everything that only a GPU can show, in under ten minutes."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "Example: ca2st bench gpu --results tests/benchmarks/results"


def gpu(
    results: Annotated[
        Path | None, typer.Option(help="Folder for the report, under a name with date and device; default: none.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Try the program on the CPU with tiny sizes; measures no GPU.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as one JSON object.")] = False,
) -> None:
    """Limits, parity, decoding rates, damaged clips and models on this machine's GPU.

    Each part has a process and a time budget of its own; one that fails is named, and the others go on. The clips are
    drawn and encoded here.
    """
    from ca2st.errors import CA2STError
    from ray_jobs.console import print_json, progress, result, say
    from ray_jobs.gpu_check.isolation import run_here, run_in_process
    from ray_jobs.gpu_check.report import as_document, file_name, lines, run_parts
    from ray_jobs.gpu_check.settings import BUDGETS, dry_settings, gpu_settings
    from ray_jobs.output_file import require_writable_place

    settings = dry_settings() if dry_run else gpu_settings()
    if results is not None:
        require_writable_place(results / "report.json", "--results")
    with progress("Trying the GPU", len(BUDGETS)) as update:
        found = run_parts(settings, run_here if dry_run else run_in_process, update=update)
    document = as_document(found, settings, command=" ".join(("ca2st", *sys.argv[1:])))
    if results is not None:
        place = results / file_name(document)
        place.write_text(json.dumps(document, indent=1) + "\n")
        say(f"wrote {place}")
    if as_json:
        print_json(document)
    else:
        for line in lines(document):
            result(line)
    if failed := [name for name, part in found.items() if part.error is not None]:
        raise CA2STError(f"bench gpu: parts that ended early: {', '.join(failed)}; the report says why")
