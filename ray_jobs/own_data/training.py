"""From a folder of videos to a trained model, and its report.

List, choose, make shards, choose again with what they show, train, and say what a person needs to know.
"""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import torch

from ca2st.errors import UserInputError, listed
from ca2st.model.config import EXPERTS
from ca2st.training.journal import JOURNAL_NAME
from ca2st.weights.hub import is_hub_name
from ray_jobs import environment
from ray_jobs.config.recipe import Recipe, recipe_document
from ray_jobs.config.recipe_file import load_recipe
from ray_jobs.console import print_json, result, say
from ray_jobs.launch import launch
from ray_jobs.own_data import choices
from ray_jobs.own_data.videos import (
    Judgement,
    OwnVideos,
    judge,
    list_videos,
    make_shards,
    run_name,
    shards_folder,
    with_stored,
)
from ray_jobs.runs.model import IMPORTED_FOLDER, start_sound, with_local_experts
from ray_jobs.runs.worker import Outcome, kept_recipe
from ray_jobs.tracking.state import read_state
from sharding.folder import read_rejects
from sharding.format.shard_set import MANIFEST_NAME, read_manifest
from sharding.settings import ConversionConfig
from sharding.source import note_lines

RECIPE = "own_data"
"""The recipe of the package that choices are put over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnPlan:
    """What is to be done with a folder."""

    videos: OwnVideos
    facts: choices.Facts
    recipe: Recipe
    """Choices and the person's own settings over the recipe of the package."""
    overrides: tuple[str, ...]
    """The person's own settings, ``section.key=value``."""
    run_dir: Path
    shards: Path
    """Folder of both shard sets."""

    def chosen(self) -> list[dict[str, Any]]:
        """Return the choices for ``--json``: the values that are used, the reason, and which of them the person set."""
        used = recipe_document(self.recipe)
        found = []
        for choice in choices.choose(self.facts):
            own = sorted(key for key in choice.settings if _is_set(key, self.overrides))
            reason = "set by you" if own and len(own) == len(choice.settings) else choice.reason
            settings = {key: reduce(getitem, key.split("."), used) for key in choice.settings}
            found.append({"settings": settings, "reason": reason, "set_by_you": own})
        return found


def plan_training(folder: Path, overrides: Sequence[str], *, out: Path | None, follow_links: bool = False) -> OwnPlan:
    """List the folder and choose as far as names allow; nothing is opened but the given expert files, nothing written.

    `out`: the run's folder; None: a folder of the run's name in ``launch.runs_folder``. `follow_links`: links in the
    folder may lead outside.

    Raises:
        UserInputError: the folder is of another form (see `list_videos`), or settings or experts are not usable.
    """
    given = load_recipe(RECIPE, overrides)
    _refuse_ignored(given, overrides)
    videos = list_videos(folder, follow_links=follow_links)
    facts = choices.Facts(
        device="cuda" if torch.cuda.is_available() else "cpu",
        classes=videos.classes,
        num_clips=len(videos.train),
        experts=_expert_sizes(given, overrides),
    )
    return _decided(videos, facts, tuple(overrides), out=out)


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
    """Train on a folder of videos and print the report, or with `dry_run` only the plan; what was finished is kept.

    Raises:
        DataDamageError: too many videos cannot be read.
        UserInputError: as `plan_training`, or the run's folder holds a training on other videos or with other settings.
    """
    plan = plan_training(folder, overrides, out=out, follow_links=follow_links)
    if dry_run and as_json:
        print_json(_plan_facts(plan))
    elif dry_run:
        for line in (*_found_lines(plan), "chosen:", *_choice_lines(plan)):
            result(line)
        result(f"would train {_plan_facts(plan)['steps']} steps into {plan.run_dir}, on shards made in {plan.shards}")
        if (plan.run_dir / JOURNAL_NAME).exists():
            result(
                f"{plan.run_dir} holds a run: with its videos and settings it goes on, with others give another --out"
            )
    else:
        for line in _found_lines(plan):
            say(line)
        done = _train(plan, ray_address=ray_address, accept_open_ray=accept_open_ray)
        if as_json:
            print_json(_outcome_facts(*done))
        else:
            for line in _outcome_lines(*done):
                result(line)


_FEW_VIDEOS = 20
_WITHOUT_EXPERTS = (
    "no pretrained experts are given: this small model learns from nothing and is only a first try. Pretrained ones "
    "would be far better: `ca2st weights import --kind clip FILE --out clip.safetensors`, videomae and ast alike, then "
    "this command again with --set experts.spatial=clip.safetensors --set experts.temporal=videomae.safetensors, and "
    "with experts.audio where there is sound"
)


def _found_lines(plan: OwnPlan) -> Iterator[str]:
    """Yield what lies in the folder: videos by class and split, and what is left aside."""
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


def _choice_lines(plan: OwnPlan) -> Iterator[str]:
    """Yield a line per choice with its reason; settings the person made are marked."""
    for choice in plan.chosen():
        settings = [
            f"{key} {_text(value)}{' (yours)' if key in choice['set_by_you'] else ''}"
            for key, value in choice["settings"].items()
        ]
        yield f"  {', '.join(settings)}: {choice['reason']}" if settings else f"  {choice['reason']}"
    if plan.facts.experts is None:
        yield _WITHOUT_EXPERTS
    elif random := [name for name in EXPERTS[plan.recipe.model.kind] if name not in plan.recipe.experts.sources()]:
        yield f'warning: no weights are given for {listed(random)}: random, and never trained under trainable "added"'


def _plan_facts(plan: OwnPlan) -> dict[str, Any]:
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
        "choices": plan.chosen(),
    }


_Sets = Mapping[str, Path]
_Done = tuple[OwnPlan, _Sets, Outcome, Judgement | None]
"""A finished training: with the choices that were used, the shards by split, and without a judgement where nothing
validates."""


def _outcome_facts(plan: OwnPlan, sets: _Sets, outcome: Outcome, judgement: Judgement | None) -> dict[str, Any]:
    """For ``--json``: what every training reports, and what is known of own videos."""
    return {
        "run_id": read_state(plan.run_dir).run_id if plan.recipe.tracking.enabled else None,
        "checkpoint": outcome.checkpoint,
        "steps": outcome.steps,
        "top1": outcome.metrics.get(outcome.main_metric),
        "metrics": outcome.metrics,
        "run_dir": str(plan.run_dir),
        "shards": {split: str(folder) for split, folder in sets.items()},
        "choices": plan.chosen(),
        "chance": judgement.chance if judgement else None,
        "mistakes": list(judgement.mistakes) if judgement else [],
        "left_out": [
            {"video": one.sample_id, "reason": one.reason, "what": one.what}
            for folder in sets.values()
            for one in read_rejects(folder)
        ],
    }


def _outcome_lines(plan: OwnPlan, sets: _Sets, outcome: Outcome, judged: Judgement | None) -> Iterator[str]:
    """Yield how good it is, what it got wrong, and what to do next."""
    yield f"trained {outcome.steps} steps; checkpoint {outcome.checkpoint}"
    if judged is None:
        yield "no class has a second video, so nothing was tested; add videos to see how good the model is"
    else:
        yield (
            f"validation: {judged.num_right} of {judged.num_videos} right (top-1 {judged.top1:.0%}); "
            f"always saying {judged.commonest!r} would get {judged.chance:.0%}"
        )
        wrong = [f"{_near(Path(one.video))}: taken for {one.said!r} ({one.probability:.0%})" for one in judged.mistakes]
        if wrong:
            yield "  " + listed([f"wrong: {mistake}" for mistake in wrong], separator="\n  ")
        if judged.num_videos < _FEW_VIDEOS:
            yield f"  few videos: each of them counts {1 / judged.num_videos:.0%}, so take the number as a hint"
    yield "next:"
    yield from (f"  {command}" for command in _next_commands(plan, sets))


def _next_commands(plan: OwnPlan, sets: _Sets) -> list[str]:
    """Return commands to go on with, ready for a shell."""
    run, video = plan.run_dir, _near((plan.videos.validation or plan.videos.train)[0].path)
    commands = [["predict", run, video, "--top", 3], ["explain", run, video, "--out", "explained.html"]]
    if "validation" in sets:
        commands.append(["evaluate", run, "--data", sets["validation"], "--views", "2x3"])
    links = ["--follow-links"] if plan.videos.follow_links else []
    own = [override for override in plan.overrides if not override.startswith("training.epochs=")]
    longer = [*own, f"training.epochs={3 * plan.recipe.training.epochs}"]
    settings = [part for setting in longer for part in ("--set", setting)]
    out = run.with_name(f"{run.name}-longer")
    commands.append(["train", "--data-folder", plan.videos.folder, *links, *settings, "--out", out])
    return [shlex.join(map(str, ["ca2st", *command])) for command in commands]


def _train(plan: OwnPlan, *, ray_address: str | None, accept_open_ray: bool) -> _Done:
    """Make the shards, choose with what they show, say so, train and judge."""
    plan = _with_fetched_experts(plan)
    sets = make_shards(plan.videos, _conversion(plan.recipe), plan.shards)
    facts = with_stored(plan.facts, plan.videos.folder, sets["train"])
    plan = _decided(plan.videos, facts, plan.overrides, out=plan.run_dir)
    if rejects := [one for root in sets.values() for one in read_rejects(root)]:
        say(f"left out, not readable: {len(rejects)} videos (rejects.jsonl beside the shards names all)")
        say("  " + listed([f"{one.sample_id}: {one.reason} ({one.what})" for one in rejects], separator="\n  "))
    silent = f" and {facts.num_silent} with silence alone" if facts.num_silent else ""
    say(
        f"shards in {sets['train'].parent}: {facts.num_clips} training videos, {facts.num_with_sound} with "
        f"sound{silent}, median {facts.median_seconds:.1f} s"
    )
    for line in ("chosen:", *_choice_lines(plan)):
        say(line)
    _refuse_other_videos(plan.run_dir, sets["train"])
    places = {split: str(folder.resolve()) for split, folder in sets.items()}
    data = replace(plan.recipe.data, train=places["train"], validation=places.get("validation"))
    outcome = launch(
        replace(plan.recipe, data=data),
        plan.run_dir,
        faults=environment.fault_points(),
        ray_address=ray_address,
        accept_open_ray=accept_open_ray,
    )
    judgement = judge(outcome, plan.videos, sets["validation"]) if "validation" in sets else None
    return plan, sets, outcome, judgement


def _refuse_ignored(given: Recipe, overrides: Sequence[str]) -> None:
    """Refuse settings of the person that the folder decides."""
    data = given.data
    shards = {
        "data.train": data.train,
        "data.mixture": data.mixture or None,
        "data.validation": data.validation,
        "data.synthetic": data.synthetic,
        "data.targets": data.targets,
    }
    if taken := [key for key, value in shards.items() if value is not None]:
        raise UserInputError(f"--set {taken[0]}: --data-folder makes the shards; leave one of the two out")
    if any(override.startswith("model.preset=") for override in overrides):
        raise UserInputError(
            "--set model.preset: --data-folder chooses kind and sizes of the model, and a preset would stand below "
            "that; set the keys themselves (`ca2st model presets` lists them), as model.fusion, or train by a recipe"
        )


def _decided(videos: OwnVideos, facts: choices.Facts, overrides: tuple[str, ...], *, out: Path | None) -> OwnPlan:
    settings = {"name": run_name(videos.folder), **choices.settings_of(choices.choose(facts))}
    recipe = load_recipe(RECIPE, [*_as_overrides(settings), *overrides])
    run_dir = out or recipe.folder
    return OwnPlan(
        videos=videos,
        facts=facts,
        recipe=recipe,
        overrides=overrides,
        run_dir=run_dir,
        shards=shards_folder(videos, _conversion(recipe), run_dir.parent),
    )


def _is_set(key: str, overrides: Sequence[str]) -> bool:
    """Return whether the person set `key`, itself or with its whole section."""
    own = {override.partition("=")[0] for override in overrides}
    return any(key == setting or key.startswith(f"{setting}.") for setting in own)


def _as_overrides(settings: Mapping[str, Any]) -> list[str]:
    """Return the settings as ``--set`` takes them: JSON's text, numbers, booleans and lists are TOML's too."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in settings.items()]


def _conversion(recipe: Recipe) -> ConversionConfig:
    """Return how the videos are stored; sound is kept where there is some, so that any kind of model can read them."""
    config = ConversionConfig(
        short_side=choices.short_side(recipe.clip.crop_size),
        num_mel_bins=recipe.clip.num_mel_bins,
        audio_policy="optional",
    )
    heard = None if recipe.start is None else start_sound(Path(recipe.start.checkpoint))
    return config if heard is None else replace(config, sample_rate_hz=heard.sample_rate_hz)


def _expert_sizes(given: Recipe, overrides: Sequence[str]) -> choices.ExpertSizes | None:
    """Return the sizes of the given experts; public ones are taken to be the published size until they are fetched."""
    sources = given.experts.sources()
    if not sources:
        return None
    if any(map(is_hub_name, sources.values())):
        return choices.published_sizes(sources)
    says_heads = _is_set("model.num_heads", overrides)
    return choices.read_expert_sizes(given.experts.files(), num_heads=given.model.num_heads if says_heads else None)


def _with_fetched_experts(plan: OwnPlan) -> OwnPlan:
    """Return the plan with files in place of public names, and with the sizes that the files have."""
    sources = plan.recipe.experts.sources()
    if not any(map(is_hub_name, sources.values())):
        return plan
    folder = plan.run_dir.parent / IMPORTED_FOLDER
    files = with_local_experts(plan.recipe, folder, environment.hub_access()).experts.files()
    overrides = plan.overrides + tuple(_as_overrides({f"experts.{name}": str(path) for name, path in files.items()}))
    facts = replace(plan.facts, experts=_expert_sizes(load_recipe(RECIPE, overrides), overrides))
    return _decided(plan.videos, facts, overrides, out=plan.run_dir)


def _refuse_other_videos(run_dir: Path, train: Path) -> None:
    """Refuse to go on with a run that was begun on other videos, in words that a newcomer knows.

    A folder whose shards are gone is left to the run's own record, which knows their hashes.
    """
    kept = kept_recipe(run_dir)
    began = None if kept is None else kept.data.train
    if began is None or not (Path(began) / MANIFEST_NAME).exists():
        return
    before, now = read_manifest(Path(began)), read_manifest(train)
    if before.fingerprint != now.fingerprint:
        raise UserInputError(
            f"{run_dir}: holds a run on {before.num_samples} training videos, the folder now gives {now.num_samples} "
            "that are not all the same; give another --out to train on them"
        )


def _near(path: Path) -> Path:
    """Return the path, relative to the working folder where it lies inside."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return f"[{', '.join(map(_text, value))}]" if isinstance(value, list) else str(value)
