"""An expert's own weights, taken out of a model or put into one."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ca2st.model.holistic import HolisticModel
from ca2st.model.structure import ExpertName, encoder_of
from ca2st.spec import ClipSpec
from ca2st.weights.errors import WeightsMismatchError
from ca2st.weights.expert_file import read_expert_file
from ca2st.weights.expert_positions import ExpertPlace, fit_positions
from ca2st.weights.strict import LoadReport, load_strictly


def expert_state(model: HolisticModel, name: ExpertName) -> dict[str, Tensor]:
    """Weights of the expert `name`, without anything that is added to it: copies on the CPU.

    Raises:
        WeightsMismatchError: the model has no such expert.
    """
    _check_expert(model, name)
    state = model.experts[name].state_dict()
    return {key: tensor.detach().cpu().clone() for key, tensor in state.items()}


def load_expert(
    model: HolisticModel,
    name: ExpertName,
    state: Mapping[str, Tensor],
    *,
    where: str = "",
    made_for: ClipSpec | None = None,
) -> LoadReport:
    """Put the weights of `expert_state` into the expert `name` of `model`; `where` names their source in messages.

    CLIP's positions for crops of `config.pretrained_crop_size` pixels are interpolated to the model's crop. `made_for`
    is the clip that an expert file says it was made for.

    Raises:
        WeightsMismatchError: the model has no such expert, the weights are not exactly its own, or their position
            tables are for another clip than the model's and its settings do not say so.
    """
    _check_expert(model, name)
    where = where or f"{name} expert"
    expert = model.experts[name]
    if state.keys() == expert.state_dict().keys():  # else it is another encoder, and the strict loader lists the names
        place = ExpertPlace(encoder=encoder_of(model.config, name), config=model.config, clip=model.clip)
        state = fit_positions(state, place, made_for=made_for, where=where)
    return load_strictly(expert, state, where=where)


def load_expert_file(model: HolisticModel, name: ExpertName, path: Path) -> LoadReport:
    """Put the expert that `ca2st weights import` or a run wrote into the expert `name` of `model`.

    Raises:
        UserInputError: there is no such file, or its weights do not fit, as `load_expert`.
        WeightsDamageError: the file cannot be read.
    """
    file = read_expert_file(path)
    return load_expert(model, name, file.tensors, where=str(path), made_for=file.made_for)


def _check_expert(model: HolisticModel, name: ExpertName) -> None:
    if name not in model.experts:
        raise WeightsMismatchError(
            f"expert {name!r}: expected one of {', '.join(model.experts)} for a {model.config.kind} model"
        )
