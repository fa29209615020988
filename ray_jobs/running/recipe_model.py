"""The model of a recipe, with its experts' weights: made, or only outlined."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from ca2st.errors import UserInputError
from ca2st.model.build import build_model
from ca2st.model.config import TargetSpec
from ca2st.model.holistic import HolisticModel
from ca2st.model.parameters import set_trainable
from ca2st.model.structure import ExpertName
from ca2st.weights.experts import load_expert_file
from ca2st.weights.hub_names import is_hub_name
from ray_jobs.config.recipe import Recipe


def target_specs(classes: Mapping[str, list[str]]) -> tuple[TargetSpec, ...]:
    """What the head predicts."""
    return tuple(TargetSpec(name=name, num_classes=len(names)) for name, names in classes.items())


def make_model(recipe: Recipe, classes: Mapping[str, list[str]]) -> HolisticModel:
    """The recipe's model, with the weights of the expert files it names and what is trained marked so."""
    model = build_model(recipe.model, recipe.clip, target_specs(classes), seed=recipe.training.seed)
    _load_experts(model, recipe.experts.files())
    set_trainable(model, recipe.trainable)
    return model


def outline_model(recipe: Recipe, classes: Mapping[str, list[str]]) -> HolisticModel:
    """The model that `make_model` would make, on the meta device: names and shapes alone, refused for the same reasons.

    Expert files are compared by names and shapes; public names, which are no files yet, are left out.
    """
    with torch.device("meta"):
        model = build_model(recipe.model, recipe.clip, target_specs(classes))
    sources = recipe.experts.sources().items()
    _load_experts(model, {name: Path(source) for name, source in sources if not is_hub_name(source)})
    set_trainable(model, recipe.trainable)
    return model


def _load_experts(model: HolisticModel, files: Mapping[ExpertName, Path]) -> None:
    for name, path in files.items():
        with _naming(name):
            load_expert_file(model, name, path)


@contextmanager
def _naming(expert: ExpertName) -> Iterator[None]:
    """Put the setting of `expert` before what its source is refused for."""
    try:
        yield
    except UserInputError as error:
        raise UserInputError(f"experts.{expert}: {error}") from error
