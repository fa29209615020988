"""Experts that a recipe names by their public names become files of this machine before anything is started."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ca2st.model.config import EncoderName
from ca2st.model.structure import EXPERTS, encoder_of
from ca2st.weights.hub import HubAccess
from ca2st.weights.hub_names import is_hub_name
from ca2st.weights.imported import ImportedExperts
from ca2st.weights.sizes import UnwrittenSizes
from ray_jobs.config.recipe import Recipe
from ray_jobs.console import say

IMPORTED_FOLDER = "imported"
"""Beside the runs: what one run imported the next one finds."""


def with_local_experts(recipe: Recipe, folder: Path, access: HubAccess) -> Recipe:
    """The recipe with paths in place of public names (`hf-hub:`, `open_clip:`, `timm:`), imported into `folder`.

    Which layouts are read follows from the encoder that the model has in an expert's place.

    Raises:
        UserInputError: an unknown name, or weights that do not fit the encoder.
        EnvironmentFault: the hub cannot be reached.
    """
    store = ImportedExperts(folder.resolve())
    local: dict[str, Any] = {}
    for expert, source in recipe.experts.sources().items():
        if is_hub_name(source) and expert in EXPERTS[recipe.model.kind]:
            encoder = encoder_of(recipe.model, expert)
            path = store.get(source, encoder, _SIZES[encoder](recipe), access)
            say(f"{expert} expert: {source} is {path}")
            local[expert] = str(path)
    return replace(recipe, experts=replace(recipe.experts, **local)) if local else recipe


_SIZES: dict[EncoderName, Callable[[Recipe], UnwrittenSizes]] = {
    "clip": lambda recipe: UnwrittenSizes(num_heads=recipe.model.num_heads),
    "videomae": lambda recipe: UnwrittenSizes(
        num_heads=recipe.model.num_heads,
        num_frames=recipe.model.pretrained_num_frames,
        crop_size=recipe.model.pretrained_crop_size,
    ),
    "ast": lambda recipe: UnwrittenSizes(num_heads=recipe.model.num_heads, mel_rows=recipe.clip.mel_rows),
    "resnet50": lambda _: UnwrittenSizes(),
}
"""What a public file does not tell and the recipe does."""
