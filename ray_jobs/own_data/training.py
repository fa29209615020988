"""From a folder of videos to a trained model: list, choose, make shards, choose again with what they show, train."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import torch

from ca2st.durable import FaultPoints
from ca2st.errors import UserInputError
from ca2st.weights.hub import is_hub_name
from ray_jobs import environment
from ray_jobs.config.recipe import Recipe, recipe_document
from ray_jobs.config.recipe_file import load_recipe
from ray_jobs.launch import launch
from ray_jobs.own_data.choices import Choice, Facts, choose, settings_of, short_side
from ray_jobs.own_data.expert_sizes import ExpertSizes, published_sizes, read_expert_sizes
from ray_jobs.own_data.listing import OwnVideos, list_videos
from ray_jobs.own_data.shards import (
    Judgement,
    OwnShards,
    conversion_config,
    judge,
    make_shards,
    run_name,
    shards_folder,
)
from ray_jobs.runs.model import IMPORTED_FOLDER, start_sound, with_local_experts
from ray_jobs.runs.start import kept_recipe
from ray_jobs.runs.worker import Outcome
from sharding.format.shard_set import MANIFEST_NAME, read_manifest
from sharding.settings import ConversionConfig

RECIPE = "own_data"
"""The recipe of the package that choices are put over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnPlan:
    """What is to be done with a folder."""

    videos: OwnVideos
    facts: Facts
    choices: tuple[Choice, ...]
    recipe: Recipe
    """Choices and the person's own settings over the recipe of the package."""
    overrides: tuple[str, ...]
    """The person's own settings, ``section.key=value``."""
    run_dir: Path
    shards: Path
    """Folder of both shard sets."""

    def chosen(self) -> list["ChosenSettings"]:
        """The choices with the values that are used, the person's own among them."""
        used = recipe_document(self.recipe)
        return [self._chosen(choice, used) for choice in self.choices]

    def _chosen(self, choice: Choice, used: Mapping[str, Any]) -> "ChosenSettings":
        own = tuple(sorted(key for key in choice.settings if _is_set(key, self.overrides)))
        all_own = choice.settings and len(own) == len(choice.settings)
        return ChosenSettings(
            settings={key: _at(used, key) for key in choice.settings},
            reason="set by you" if all_own else choice.reason,
            own=own,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenSettings:
    """A choice as it is told."""

    settings: Mapping[str, Any]
    reason: str
    own: tuple[str, ...]
    """Which of the settings the person set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnOutcome:
    """A finished training on a folder."""

    plan: OwnPlan
    """With the choices that were used."""
    shards: OwnShards
    outcome: Outcome
    judgement: Judgement | None
    """None without validation."""


def plan_training(folder: Path, overrides: Sequence[str], *, out: Path | None, follow_links: bool = False) -> OwnPlan:
    """List the folder and choose as far as names tell; nothing is opened but the given expert files, nothing written.

    `out`: the run's folder; None: a folder of the run's name in ``launch.runs_folder``. `follow_links`: links in the
    folder may lead outside.

    Raises:
        UserInputError: the folder is of another form (see `list_videos`), or settings or experts are not usable.
    """
    given = load_recipe(RECIPE, overrides)
    _refuse_ignored(given, overrides)
    videos = list_videos(folder, follow_links=follow_links)
    facts = Facts(
        device="cuda" if torch.cuda.is_available() else "cpu",
        classes=videos.classes,
        num_clips=len(videos.train),
        experts=_expert_sizes(given, overrides),
    )
    return _decided(videos, facts, tuple(overrides), out=out)


def train_on_videos(
    plan: OwnPlan,
    *,
    faults: FaultPoints,
    told: "Callable[[OwnPlan, OwnShards], None]",
    ray_address: str | None = None,
    accept_open_ray: bool = False,
) -> OwnOutcome:
    """Make the shards, choose with what they show, train and judge; what was finished before is kept.

    `told` is called with the final plan and its shards before training starts.

    Raises:
        DataDamageError: too many videos cannot be read.
        UserInputError: the run's folder holds a training on other videos or with other settings.
    """
    plan = _with_fetched_experts(plan)
    shards = make_shards(plan.videos, _conversion(plan.recipe), plan.shards)
    facts = replace(
        plan.facts,
        num_clips=shards.num_clips,
        num_with_sound=shards.num_with_sound,
        num_silent=shards.num_silent,
        median_seconds=shards.median_seconds,
    )
    plan = _decided(plan.videos, facts, plan.overrides, out=plan.run_dir)
    told(plan, shards)
    _refuse_other_videos(plan.run_dir, shards)
    sets = {split: str(folder.resolve()) for split, folder in shards.sets.items()}
    data = replace(plan.recipe.data, train=sets["train"], validation=sets.get("validation"))
    outcome = launch(
        replace(plan.recipe, data=data),
        plan.run_dir,
        faults=faults,
        ray_address=ray_address,
        accept_open_ray=accept_open_ray,
    )
    judgement = judge(outcome, plan.videos, shards.sets["validation"]) if "validation" in sets else None
    return OwnOutcome(plan=plan, shards=shards, outcome=outcome, judgement=judgement)


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
    if "model.preset" in _keys(overrides):
        raise UserInputError(
            "--set model.preset: --data-folder chooses kind and sizes of the model, and a preset would stand below "
            "that; set the keys themselves (`ca2st model presets` lists them), as model.fusion, or train by a recipe"
        )


def _decided(videos: OwnVideos, facts: Facts, overrides: tuple[str, ...], *, out: Path | None) -> OwnPlan:
    choices = choose(facts)
    chosen = {"name": run_name(videos.folder), **settings_of(choices)}
    recipe = load_recipe(RECIPE, [*_as_overrides(chosen), *overrides])
    run_dir = out or Path(recipe.launch.runs_folder) / recipe.name
    return OwnPlan(
        videos=videos,
        facts=facts,
        choices=choices,
        recipe=recipe,
        overrides=overrides,
        run_dir=run_dir,
        shards=shards_folder(videos, _conversion(recipe), run_dir.parent),
    )


def _keys(overrides: Sequence[str]) -> set[str]:
    return {override.partition("=")[0] for override in overrides}


def _is_set(key: str, overrides: Sequence[str]) -> bool:
    """Whether the person set `key`, itself or with its whole section."""
    return any(key == own or key.startswith(f"{own}.") for own in _keys(overrides))


def _at(document: Mapping[str, Any], key: str) -> Any:
    """The value of ``section.key``."""
    return reduce(getitem, key.split("."), document)


def _as_overrides(settings: Mapping[str, Any]) -> list[str]:
    """Settings as ``--set`` takes them: JSON's text, numbers, booleans and lists are TOML's too."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in settings.items()]


def _conversion(recipe: Recipe) -> ConversionConfig:
    return conversion_config(
        short_side=short_side(recipe.clip.crop_size),
        num_mel_bins=recipe.clip.num_mel_bins,
        heard=None if recipe.start is None else start_sound(Path(recipe.start.checkpoint)),
    )


def _expert_sizes(given: Recipe, overrides: Sequence[str]) -> ExpertSizes | None:
    """Of the experts that are given; public ones are taken to be the published size until they are fetched."""
    sources = given.experts.sources()
    if not sources:
        return None
    if any(map(is_hub_name, sources.values())):
        return published_sizes(sources)
    says_heads = _is_set("model.num_heads", overrides)
    return read_expert_sizes(given.experts.files(), num_heads=given.model.num_heads if says_heads else None)


def _with_fetched_experts(plan: OwnPlan) -> OwnPlan:
    """The plan with files in place of public names, and with the sizes that the files have."""
    sources = plan.recipe.experts.sources()
    if not any(map(is_hub_name, sources.values())):
        return plan
    folder = plan.run_dir.parent / IMPORTED_FOLDER
    files = with_local_experts(plan.recipe, folder, environment.hub_access()).experts.files()
    overrides = plan.overrides + tuple(_as_overrides({f"experts.{name}": str(path) for name, path in files.items()}))
    facts = replace(plan.facts, experts=_expert_sizes(load_recipe(RECIPE, overrides), overrides))
    return _decided(plan.videos, facts, overrides, out=plan.run_dir)


def _refuse_other_videos(run_dir: Path, shards: OwnShards) -> None:
    """Refuse to go on with a run that was begun on other videos, in words that a newcomer knows.

    A folder whose shards are gone is left to the run's own record, which knows their hashes.
    """
    kept = kept_recipe(run_dir)
    began = None if kept is None else kept.data.train
    if began is None or not (Path(began) / MANIFEST_NAME).exists():
        return
    before, now = read_manifest(Path(began)), read_manifest(shards.sets["train"])
    if before.fingerprint != now.fingerprint:
        raise UserInputError(
            f"{run_dir}: holds a run on {before.num_samples} training videos, the folder now gives {now.num_samples} "
            "that are not all the same; give another --out to train on them"
        )
