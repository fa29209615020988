"""In which type frozen experts are held: float32 as they were read, or bfloat16 where autocast would cast them anyway.

Under bfloat16 autocast every Linear and convolution casts its weights on every use. A frozen weight never changes, so
holding it in bfloat16 gives the same products (bit for bit where the same kernel makes them), in half the memory and
without the cast, whose result autograd would also keep for the backward pass. Norms, tables of positions and tokens,
running statistics, and everything that is trained stay float32.
"""

import torch
from torch import nn

from ca2st.model.choices import ExpertPrecision, HeldPrecision, check_expert_precision
from ca2st.model.holistic import HolisticModel

_CAST_BY_AUTOCAST = (nn.Linear, nn.Conv2d, nn.Conv3d)


def held_precision(wanted: ExpertPrecision, *, training: HeldPrecision, device: str) -> HeldPrecision:
    """What `auto` means here: bfloat16 on a GPU that computes in it, float32 otherwise.

    `training` is the precision of the computation, `device` torch's word for the kind of device. Raises as
    `check_expert_precision`.
    """
    check_expert_precision(wanted, training=training)
    if wanted != "auto":
        return wanted
    return "bf16" if device == "cuda" and training == "bf16" else "fp32"


def hold_experts(model: HolisticModel, precision: HeldPrecision) -> None:
    """Hold the experts' frozen weights and biases of Linears and convolutions in `precision`, in place.

    Call it after weights are loaded, kept and marked as trained or frozen. Once in bfloat16 the model computes under
    bfloat16 autocast only, and `fp32` does not bring the lost bits back: it leaves the model as it is.
    """
    if precision == "fp32":
        return
    for expert in model.experts.values():
        for module in expert.modules():
            if isinstance(module, _CAST_BY_AUTOCAST):
                for parameter in module.parameters(recurse=False):
                    if not parameter.requires_grad:
                        parameter.data = parameter.data.to(torch.bfloat16)
