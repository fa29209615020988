"""``ca2st doctor``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ray_jobs.doctor.finding import Finding


def doctor(
    out: Annotated[Path, typer.Option(help="Folder that runs are written under.")] = Path("runs"),
    tracking_uri: Annotated[str | None, typer.Option(help="MLflow store; default: as a training takes it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as one JSON object.")] = False,
) -> None:
    """Try what a training needs on this machine: packages, GPU, codecs, disk, MLflow, Ray; and say how to mend it.

    Ends with 4 where something needed does not work; what is only slower without it is marked optional.

    Example: ca2st doctor
    """
    from ca2st.errors import EnvironmentFault
    from ray_jobs.console import print_json, result
    from ray_jobs.doctor.examination import all_checks, examine

    findings = []
    for finding in examine(all_checks(out, tracking_uri=tracking_uri)):
        findings.append(finding)
        if not as_json:
            result(_line(finding))
    if as_json:
        print_json({"checks": findings})
    if broken := [finding.name for finding in findings if not finding.ok and finding.needed]:
        raise EnvironmentFault(f"needed and not working: {', '.join(broken)}; the mend stands with each")


def _line(finding: "Finding") -> str:
    mark = "ok" if finding.ok else "NOT OK" if finding.needed else "optional"
    mend = f"\n{'':<25}mend: {finding.mend}" if not finding.ok else ""
    return f"{mark:<9}{finding.name:<16}{finding.what}{mend}"
