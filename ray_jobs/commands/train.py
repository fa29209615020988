"""``ca2st train``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ca2st.errors import UserInputError

if TYPE_CHECKING:
    from ray_jobs.config import Recipe

RUNS_FOLDER = Path("runs")
_ONE_OF_TWO = (
    "expected either a recipe (with --data where it names no shards) or --data-folder DIR, a folder of videos; "
    "for example: ca2st train smoke, or: ca2st train --data-folder videos"
)


def train(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe file, or the name of one that ships with ca2st.")
    ] = None,
    data_folder: Annotated[
        Path | None, typer.Option(help="A folder of your own videos, a folder a class, instead of a recipe.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override a setting: section.key=value.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Training shards, a folder or a URL, instead of the recipe's.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Training processes; one a GPU where there are GPUs.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default: runs/<recipe's name>.")] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Train under Ray Train, which restarts failed workers.")] = False,
    ray_address: Annotated[str, typer.Option(help="Ray cluster to use with --ray; default: one of our own.")] = "local",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read recipe and manifests, print the plan, train nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as one JSON object.")] = False,
) -> None:
    """Train by a recipe, or on a folder of videos. Rerun the same command to resume where it stopped.

    Example: ca2st train smoke, or: ca2st train --data-folder videos
    """
    from ray_jobs.console import print_json
    from ray_jobs.environment import fault_points
    from ray_jobs.launch import launch
    from ray_jobs.recipe_file import load_recipe
    from ray_jobs.start import check_model
    from ray_jobs.synthetic_data import synthetic_classes, with_synthetic_shards
    from ray_jobs.tracking.tracker import read_state
    from ray_jobs.wiring import check_settings

    settings = list(overrides or [])
    if data is not None:
        settings += [f"data.train={data!r}", "data.mixture=[]"]
    if workers is not None:
        settings.append(f"launch.workers={workers}")
    if data_folder is not None and recipe is None and data is None:
        from ray_jobs.own_data.command import train_own_videos

        train_own_videos(
            data_folder,
            settings,
            runs_folder=RUNS_FOLDER,
            out=out,
            ray_address=ray_address if ray else None,
            dry_run=dry_run,
            as_json=as_json,
        )
        return
    if recipe is None or data_folder is not None:
        raise UserInputError(_ONE_OF_TWO)
    loaded = load_recipe(recipe, settings)
    run_dir = out or RUNS_FOLDER / loaded.name
    if dry_run:
        _print_plan(loaded, run_dir, as_json=as_json)
        return
    if (classes := synthetic_classes(loaded)) is not None:  # refused before any clip is drawn
        check_settings(loaded)
        check_model(loaded, classes, run_dir)
    loaded = with_synthetic_shards(loaded, run_dir.parent)
    outcome = launch(loaded, run_dir, faults=fault_points(), ray_address=ray_address if ray else None)
    run_id = read_state(run_dir).run_id if loaded.tracking.enabled else None
    score = outcome.metrics.get(outcome.main_metric)
    facts: dict[str, object] = {
        "run_id": run_id,
        "checkpoint": outcome.checkpoint,
        "steps": outcome.steps,
        "top1": score,
        "metrics": outcome.metrics,
        "run_dir": str(run_dir),
    }
    if as_json:
        print_json(facts)
        return
    _print_facts(facts, loaded)


def _print_facts(facts: dict[str, object], recipe: "Recipe") -> None:
    from ray_jobs.console import result, table

    result(table({name: value for name, value in facts.items() if value is not None and name != "metrics"}))
    if recipe.data.validation is not None:
        result(f"\nnext: ca2st evaluate {facts['run_dir']} --data {recipe.data.validation} --views 2x3")


def _print_plan(recipe: "Recipe", run_dir: Path, *, as_json: bool) -> None:
    from ca2st.model.info import model_info
    from ray_jobs.console import print_json, result, table
    from ray_jobs.start import check_model
    from ray_jobs.wiring import target_specs

    facts: dict[str, object] = {"name": recipe.name, "model": recipe.model.kind, "epochs": recipe.training.epochs}
    facts |= {"trains": recipe.trainable, "experts_precision": _held_precision(recipe)}
    if recipe.start is not None:
        facts["start"] = {"checkpoint": recipe.start.checkpoint, "head": recipe.start.head}
    classes, read = _classes_and_reading(recipe)
    if start := check_model(recipe, classes, run_dir):
        facts["start"] = dict(start)
    info = model_info(recipe.model, recipe.clip, target_specs(classes), trainable=recipe.trainable)
    facts |= {"trainable": info.trainable, "total": info.total, "gmacs": info.gmacs}
    facts |= read
    steps_per_epoch = read["steps_per_epoch"]
    facts |= {
        "steps": recipe.training.total_steps(steps_per_epoch),
        "global_batch_size": recipe.training.global_batch_size,
        "workers": recipe.launch.workers,
    }
    if as_json:
        print_json(facts)
    else:
        result(table({name: _shown(value) for name, value in facts.items()}))


def _classes_and_reading(recipe: "Recipe") -> tuple[dict[str, list[str]], dict[str, int]]:
    """Class names of each target, and how much is read: of the shards, or of a world not yet drawn."""
    from ray_jobs.synthetic_data import synthetic_classes
    from ray_jobs.wiring import check_settings, preflight, sample_plan

    world = recipe.data.synthetic
    if world is not None and (classes := synthetic_classes(recipe)) is not None:
        check_settings(recipe)
        steps = world.num_train // recipe.training.global_batch_size
        return classes, {"num_samples": world.num_train, "steps_per_epoch": steps}
    data = preflight(recipe)
    plan = sample_plan(recipe, data)
    return data.classes, {"num_samples": plan.num_samples, "steps_per_epoch": plan.num_steps}


def _shown(value: object) -> object:
    """A fact in a line: of a list of tensors only how many they are."""
    if isinstance(value, dict):
        counts = {key: len(inner) if isinstance(inner, list) else inner for key, inner in value.items()}
        return ", ".join(f"{key} {inner}" for key, inner in counts.items() if inner is not None)
    return ", ".join(map(str, value)) if isinstance(value, tuple) else value


def _held_precision(recipe: "Recipe") -> str:
    """How this machine would hold the experts."""
    import torch

    from ca2st.model.precision import held_precision

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return held_precision(recipe.experts.precision, training=recipe.training.precision, device=device)
