"""The part of ``ca2st train`` that begins with a folder of videos instead of a recipe."""

from collections.abc import Sequence
from pathlib import Path

from ray_jobs.console import print_json, result, say
from ray_jobs.environment import fault_points
from ray_jobs.own_data.report import (
    choice_lines,
    found_lines,
    left_out_lines,
    outcome_facts,
    outcome_lines,
    plan_facts,
    shards_line,
)
from ray_jobs.own_data.shards import OwnShards
from ray_jobs.own_data.training import OwnPlan, plan_training, train_on_videos


def train_own_videos(
    folder: Path,
    overrides: Sequence[str],
    *,
    out: Path | None,
    follow_links: bool = False,
    ray_address: str | None,
    accept_open_ray: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train on a folder of videos, or with `dry_run` only say how; raises as `plan_training` and `train_on_videos`."""
    plan = plan_training(folder, overrides, out=out, follow_links=follow_links)
    if dry_run:
        _print_plan(plan, as_json=as_json)
        return
    for line in found_lines(plan):
        say(line)
    done = train_on_videos(
        plan, faults=fault_points(), ray_address=ray_address, accept_open_ray=accept_open_ray, told=_tell
    )
    if as_json:
        print_json(outcome_facts(done))
        return
    for line in outcome_lines(done):
        result(line)


def _tell(plan: OwnPlan, shards: OwnShards) -> None:
    for line in (*left_out_lines(shards.left_out), shards_line(shards), "chosen:", *choice_lines(plan)):
        say(line)


def _print_plan(plan: OwnPlan, *, as_json: bool) -> None:
    facts = plan_facts(plan)
    if as_json:
        print_json(facts)
        return
    for line in (*found_lines(plan), "chosen:", *choice_lines(plan)):
        result(line)
    result(f"would train {facts['steps']} steps into {plan.run_dir}, on shards made in {plan.shards}")
