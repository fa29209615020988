"""The published trainings: their recipes as rows of a table, the classes and samples of their datasets, their hours."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ca2st.errors import UserInputError
from ca2st.model.inspect import ModelInfo, model_info
from pipelines.order.plan import count_steps
from ray_jobs.config.recipe import Recipe
from ray_jobs.config.recipe_file import known_recipes, load_recipe
from ray_jobs.runs.data import TrainingData
from ray_jobs.runs.hours import Rate, counted_hours, rate_of, spoken_hours, work_of
from ray_jobs.runs.model import target_specs
from sharding.datasets.label_spaces import published_classes
from sharding.datasets.media_tree import PUBLISHED_ROWS, PUBLISHED_WITH_SOUND
from sharding.format.shard_set import MANIFEST_NAME


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedRow:
    """A recipe beside what is published for it."""

    name: str
    dataset: str
    model: str
    """``cast``, ``cava``, ``ca2st``."""
    published_top1: float | None
    """Percent."""
    views: str
    """Clips x crops of the published test."""
    clips: int
    """Samples of the training split as published."""
    epochs: int
    shards: list[str]
    """Which of the recipe's sets are here: ``train``, ``validation``."""
    hours: float | None
    """Of one training; None where they were not asked for."""


def published_recipes() -> Iterator[Recipe]:
    """Yield the recipes of the package that the paper has a result for, or that follow it."""
    for name in known_recipes():
        recipe = load_recipe(name)
        if recipe.published is not None:
            yield recipe


def published_rows(
    recipes: Iterable[Recipe], *, with_hours: bool, device: str | None = None, workers: int = 1
) -> list[PublishedRow]:
    """Return a row of each published recipe; hours are those of `workers` such devices; None: of this machine."""
    rate = rate_of(device, None) if with_hours else None
    known: dict[object, ModelInfo] = {}
    rows = []
    for recipe in recipes:
        published = recipe.published
        assert published is not None
        clips = published_count(published.dataset, "train", recipe.data.split)
        rows.append(
            PublishedRow(
                name=recipe.name,
                dataset=published.dataset,
                model=recipe.model.kind,
                published_top1=published.top1,
                views=published.views,
                clips=clips,
                epochs=recipe.training.epochs,
                shards=[
                    role
                    for role, place in {"train": recipe.data.train, "validation": recipe.data.validation}.items()
                    if place is not None and (Path(place) / MANIFEST_NAME).is_file()
                ],
                hours=None if rate is None else _hours(recipe, published.dataset, rate, known, workers=workers),
            )
        )
    return rows


def _hours(recipe: Recipe, dataset: str, rate: Rate, known: dict[object, ModelInfo], *, workers: int) -> float:
    """Return hours by the published counts; a model is counted once, since heads of other sizes hardly differ."""
    clips, samples = (published_count(dataset, one, recipe.data.split) for one in ("train", validation_split(recipe)))
    key = (replace(recipe.model, drop_path_rate=0.0), recipe.clip, dataset == "epic_kitchens_100")
    if key not in known:
        targets = target_specs(published_spaces(dataset))
        known[key] = model_info(recipe.model, recipe.clip, targets, trainable=recipe.trainable)
    epoch = count_steps(clips, recipe.training.global_batch_size, remainder=recipe.data.remainder)
    steps = recipe.training.total_steps(epoch)
    work = work_of(recipe, known[key], steps=steps, steps_per_epoch=epoch, num_validation=samples)
    return float(counted_hours(work, rate, workers=workers)["hours"])


def validation_split(recipe: Recipe) -> str:
    """Return the split that a published recipe validates on: the last folder of the place of its shards."""
    return Path(recipe.data.validation or "validation").name


def published_spaces(dataset: str) -> dict[str, list[str]]:
    """Return the class names of each target of a published dataset."""
    if dataset == "epic_kitchens_100":
        return {name: list(published_classes(f"{dataset}_{name}s")) for name in ("verb", "noun")}
    return {"label": list(published_classes(dataset))}


def published_count(dataset: str, split: str, number: int | None) -> int:
    """Return the samples of a published split, with sound where that is what is kept; `number`: of several splits.

    One that does not exist is a UserInputError.
    """
    counts = PUBLISHED_WITH_SOUND.get(dataset, PUBLISHED_ROWS[dataset]).get(split, ())
    place = (number or 1) - 1
    if not 0 <= place < len(counts):
        known = ", ".join(f"{name} ({len(rows)})" for name, rows in PUBLISHED_ROWS[dataset].items())
        raise UserInputError(
            f"--assume-published-counts: expected a split of {dataset}, which are {known}, found {split} "
            f"{number or ''}; give the shards by --data"
        )
    return counts[place]


def count_notes(data: TrainingData | None) -> list[str]:
    """Return a note on each set that has another number of samples than its published list."""
    if data is None:
        return []
    notes = []
    for one in data.sets:
        manifest = one.manifest
        tables = (PUBLISHED_ROWS, PUBLISHED_WITH_SOUND)
        counts = [count for rows in tables for count in rows.get(manifest.dataset, {}).get(manifest.split, ())]
        if counts and manifest.num_samples not in counts:
            rejected = sum(manifest.rejected.values())
            notes.append(
                f"{one.where}: {manifest.num_samples} samples, published are {' or '.join(map(str, counts))}; "
                f"{rejected} were rejected"
            )
    return notes


def rows_lines(rows: Sequence[PublishedRow]) -> str:
    """Return the rows as a person reads them."""
    has_hours = any(row.hours is not None for row in rows)
    head = ["recipe", "dataset", "model", "top-1", "views", "clips", "epochs", "shards here"]
    lines = [[*head, "hours"] if has_hours else head]
    for row in rows:
        top1 = "" if row.published_top1 is None else f"{row.published_top1:.1f}"
        cells = [row.name, row.dataset, row.model, top1, row.views, f"{row.clips:,}", str(row.epochs)]
        cells.append(", ".join(row.shards) or "none")
        lines.append([*cells, spoken_hours(row.hours)] if row.hours is not None else cells)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
