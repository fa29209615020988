"""An expert's own weights, taken out of a model or put into one."""

from collections.abc import Mapping

from torch import Tensor

from ca2st.model.holistic import HolisticModel
from ca2st.model.structure import ExpertName
from ca2st.weights.errors import WeightsMismatchError
from ca2st.weights.strict import LoadReport, load_strictly


def expert_state(model: HolisticModel, name: ExpertName) -> dict[str, Tensor]:
    """Weights of the expert `name`, without anything that is added to it: copies on the CPU.

    Raises:
        WeightsMismatchError: the model has no such expert.
    """
    _check_expert(model, name)
    state = model.experts[name].state_dict()
    return {key: tensor.detach().cpu().clone() for key, tensor in state.items()}


def load_expert(model: HolisticModel, name: ExpertName, state: Mapping[str, Tensor], *, where: str = "") -> LoadReport:
    """Put the weights of `expert_state` into the expert `name` of `model`; `where` names their source in messages.

    Raises:
        WeightsMismatchError: the model has no such expert, or the weights are not exactly its own.
    """
    _check_expert(model, name)
    return load_strictly(model.experts[name], state, where=where or f"{name} expert")


def _check_expert(model: HolisticModel, name: ExpertName) -> None:
    if name not in model.experts:
        raise WeightsMismatchError(
            f"expert {name!r}: expected one of {', '.join(model.experts)} for a {model.config.kind} model"
        )
