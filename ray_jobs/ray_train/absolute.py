"""Paths of a recipe that mean the same in a Ray worker, which runs in a folder of Ray's."""

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from ca2st.weights.hub_names import is_hub_name
from ray_jobs.config.recipe import Recipe

Place = TypeVar("Place", str, str | None)


def with_absolute_paths(recipe: Recipe, base: Path) -> Recipe:
    """`recipe` with every relative path made absolute from `base`; URLs and public names stay."""
    data, experts, start = recipe.data, recipe.experts, recipe.start
    return replace(
        recipe,
        data=replace(
            data,
            train=_absolute(data.train, base),
            mixture=tuple(replace(one, train=_absolute(one.train, base)) for one in data.mixture),
            validation=_absolute(data.validation, base),
            loader=replace(data.loader, cache_dir=_absolute(data.loader.cache_dir, base)),
        ),
        experts=replace(
            experts,
            spatial=_absolute(experts.spatial, base),
            temporal=_absolute(experts.temporal, base),
            audio=_absolute(experts.audio, base),
        ),
        start=None if start is None else replace(start, checkpoint=_absolute(start.checkpoint, base)),
    )


def _absolute(place: Place, base: Path) -> Place:
    if place is None or "://" in place or is_hub_name(place):
        return place
    return str(base / place)
