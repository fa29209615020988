"""The report of a training on a folder of videos, and its command.

What a person who trains on own videos is told: choices with reasons, what was left out, mistakes, what is next.

The part of ``ca2st train`` that begins with a folder of videos instead of a recipe.
"""

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ca2st.errors import listed
from ca2st.model.config import EXPERTS
from ray_jobs.console import print_json, result, say
from ray_jobs.environment import fault_points
from ray_jobs.own_data.shards import Judgement, LeftOut, OwnShards
from ray_jobs.own_data.training import OwnOutcome, OwnPlan, plan_training, train_on_videos
from ray_jobs.tracking.state import read_state
from sharding.source import note_lines

_FEW_VIDEOS = 20
_WITHOUT_EXPERTS = (
    "no pretrained experts are given: this small model learns from nothing and is only a first try. Pretrained ones "
    "would be far better: `ca2st weights import --kind clip FILE --out clip.safetensors`, videomae and ast alike, then "
    "this command again with --set experts.spatial=clip.safetensors --set experts.temporal=videomae.safetensors, and "
    "with experts.audio where there is sound"
)


def found_lines(plan: OwnPlan) -> Iterator[str]:
    """What lies in the folder: videos by class and split, and what is left aside."""
    videos = plan.videos
    train, validation = videos.count("train"), videos.count("validation")
    how = "as the folder says" if videos.splits_given else "by the hash of their names, the same every time"
    yield (
        f"{videos.folder}: {len(videos.train) + len(videos.validation)} videos of {len(videos.classes)} classes; "
        f"{len(videos.train)} train, {len(videos.validation)} validate, {how}"
    )
    classes = [f"{name}: {train[name]} + {validation[name]}" for name in videos.classes]
    yield "  " + listed(classes, most=20, separator="\n  ")
    if videos.only_trained and videos.splits_given:
        yield f"only trained on, having no validation videos: {listed(videos.only_trained)}"
    elif videos.only_trained:
        yield f"only trained on, being single: the videos of {listed(videos.only_trained)}; two or more can be tested"
    if videos.left_aside:
        yield f"left aside, no training or validation videos: {listed(videos.left_aside)}"
    yield from note_lines(videos.source("train").notes)


def choice_lines(plan: OwnPlan) -> Iterator[str]:
    """Every choice in a line with its reason; settings the person made are marked."""
    for choice in plan.chosen():
        told = [
            f"{key} {_text(value)}{' (yours)' if key in choice.own else ''}" for key, value in choice.settings.items()
        ]
        yield f"  {', '.join(told)}: {choice.reason}" if told else f"  {choice.reason}"
    if plan.facts.experts is None:
        yield _WITHOUT_EXPERTS
    elif random := [name for name in EXPERTS[plan.recipe.model.kind] if name not in plan.recipe.experts.sources()]:
        yield f'warning: no weights are given for {listed(random)}: random, and never trained under trainable "added"'


def plan_facts(plan: OwnPlan) -> dict[str, Any]:
    """For ``--dry-run``: what would be done."""
    training = plan.recipe.training
    steps_per_epoch = plan.facts.num_clips // training.global_batch_size
    return {
        "name": plan.recipe.name,
        "model": plan.recipe.model.kind,
        "classes": list(plan.videos.classes),
        "num_train": len(plan.videos.train),
        "num_validation": len(plan.videos.validation),
        "epochs": training.epochs,
        "steps_per_epoch": steps_per_epoch,
        "steps": training.total_steps(steps_per_epoch),
        "global_batch_size": training.global_batch_size,
        "workers": plan.recipe.launch.workers,
        "shards": str(plan.shards),
        "run_dir": str(plan.run_dir),
        "choices": choice_facts(plan),
    }


def choice_facts(plan: OwnPlan) -> list[dict[str, Any]]:
    """The choices for ``--json``."""
    return [
        {"settings": dict(choice.settings), "reason": choice.reason, "set_by_you": list(choice.own)}
        for choice in plan.chosen()
    ]


def outcome_facts(done: OwnOutcome) -> dict[str, Any]:
    """For ``--json``: what every training tells, and what is known of own videos."""
    plan, outcome, judgement = done.plan, done.outcome, done.judgement
    return {
        "run_id": read_state(plan.run_dir).run_id if plan.recipe.tracking.enabled else None,
        "checkpoint": outcome.checkpoint,
        "steps": outcome.steps,
        "top1": outcome.metrics.get(outcome.main_metric),
        "metrics": outcome.metrics,
        "run_dir": str(plan.run_dir),
        "shards": {split: str(folder) for split, folder in done.shards.sets.items()},
        "choices": choice_facts(plan),
        "chance": judgement.chance if judgement else None,
        "mistakes": list(judgement.mistakes) if judgement else [],
        "left_out": list(done.shards.left_out),
    }


def left_out_lines(left_out: Sequence[LeftOut]) -> Iterator[str]:
    """The videos that cannot be read."""
    if left_out:
        yield f"left out, not readable: {len(left_out)} videos (rejects.jsonl beside the shards names all)"
        yield "  " + listed([f"{one.video}: {one.reason} ({one.what})" for one in left_out], separator="\n  ")


def outcome_lines(done: OwnOutcome) -> Iterator[str]:
    """How good it is, what it got wrong, and what to do next."""
    yield f"trained {done.outcome.steps} steps; checkpoint {done.outcome.checkpoint}"
    if done.judgement is None:
        yield "no class has a second video, so nothing was tested; add videos to see how good the model is"
    else:
        yield from _judgement_lines(done.judgement)
    yield "next:"
    yield from (f"  {command}" for command in next_commands(done))


def _judgement_lines(judgement: Judgement) -> Iterator[str]:
    yield (
        f"validation: {judgement.num_right} of {judgement.num_videos} right (top-1 {judgement.top1:.0%}); "
        f"always saying {judgement.commonest!r} would get {judgement.chance:.0%}"
    )
    wrong = [
        f"wrong: {_near(Path(one.video))}: taken for {one.said!r} ({one.probability:.0%})" for one in judgement.mistakes
    ]
    if wrong:
        yield "  " + listed(wrong, separator="\n  ")
    if judgement.num_videos < _FEW_VIDEOS:
        yield f"  few videos: each of them counts {1 / judgement.num_videos:.0%}, so take the number as a hint"


def next_commands(done: OwnOutcome) -> list[str]:
    """Commands to go on with, ready for a shell."""
    plan = done.plan
    run, video = _quoted(plan.run_dir), _quoted(_near((plan.videos.validation or plan.videos.train)[0].path))
    commands = [f"ca2st predict {run} {video} --top 3", f"ca2st explain {run} {video} --out explained.html"]
    if "validation" in done.shards.sets:
        commands.append(f"ca2st evaluate {run} --data {_quoted(done.shards.sets['validation'])} --views 2x3")
    own = [override for override in plan.overrides if not override.startswith("training.epochs=")]
    settings = "".join(f" --set {shlex.quote(setting)}" for setting in own)
    longer = _quoted(plan.run_dir.with_name(f"{plan.run_dir.name}-longer"))
    epochs = 3 * plan.recipe.training.epochs
    links = " --follow-links" if plan.videos.follow_links else ""
    again = f"ca2st train --data-folder {_quoted(plan.videos.folder)}{links}{settings}"
    commands.append(f"{again} --set training.epochs={epochs} --out {longer}")
    return commands


def shards_line(shards: OwnShards) -> str:
    """Where the shards lie and what they hold."""
    silent = f" and {shards.num_silent} with silence alone" if shards.num_silent else ""
    return (
        f"shards in {shards.sets['train'].parent}: {shards.num_clips} training videos, {shards.num_with_sound} with "
        f"sound{silent}, median {shards.median_seconds:.1f} s"
    )


def _near(path: Path) -> Path:
    """Relative to the working folder where it lies inside."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return f"[{', '.join(map(_text, value))}]" if isinstance(value, list) else str(value)


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
