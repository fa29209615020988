"""Names of VideoMAE's encoder. q and v have biases, k has none: a file without them is refused, never filled up."""

from ca2st.weights.layouts.layout import Layout
from ca2st.weights.published_tables import Names

_ORIGINAL = Layout(
    name="VideoMAE",
    prefixes=(
        "module.backbone.",
        "module.encoder.",
        "module.",
        "backbone.",
        "encoder.",
        "",
    ),
    marker="blocks.0.attn.qkv.weight",
    once=Names(modules={"patch_embed.proj": "patch_embed", "norm": "norm", "fc_norm": "norm"}),
    layer_prefix="blocks.",
    layer=Names(
        modules={
            "norm1": "norm1",
            "attn.proj": "attention.proj",
            "norm2": "norm2",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
        },
        tensors={
            "attn.qkv.weight": "attention.qkv.weight",
            "attn.q_bias": "attention.q_bias",
            "attn.v_bias": "attention.v_bias",
        },
    ),
    ignored=tuple(
        f"{prefix}{name}"
        for prefix in ("", "module.", "backbone.", "module.backbone.")
        for name in ("decoder.*", "encoder_to_decoder.*", "mask_token", "head.*")
    ),
)
"""Pretrained (`encoder.`, `norm`) and fine-tuned (`fc_norm`) files."""

_HUGGING_FACE = Layout(
    name="Hugging Face VideoMAEModel",
    prefixes=("videomae.", ""),
    marker="encoder.layer.0.attention.attention.query.weight",
    once=Names(modules={"embeddings.patch_embeddings.projection": "patch_embed", "layernorm": "norm"}),
    outside=Names(modules={"fc_norm": "norm"}),
    layer_prefix="encoder.layer.",
    layer=Names(
        modules={
            "layernorm_before": "norm1",
            "attention.output.dense": "attention.proj",
            "layernorm_after": "norm2",
            "intermediate.dense": "mlp.fc1",
            "output.dense": "mlp.fc2",
        },
        tensors={
            "attention.attention.query.bias": "attention.q_bias",
            "attention.attention.q_bias": "attention.q_bias",
            "attention.attention.value.bias": "attention.v_bias",
            "attention.attention.v_bias": "attention.v_bias",
        },
    ),
    joined={
        "attention.qkv.weight": tuple(f"attention.attention.{part}.weight" for part in ("query", "key", "value")),
    },
    ignored=("classifier.*", "decoder.*", "encoder_to_decoder.*", "mask_token"),
)
"""Old files call the biases `q_bias` and `v_bias`. With mean pooling the final norm is the classifier's `fc_norm`."""

VIDEOMAE_LAYOUTS = (_ORIGINAL, _HUGGING_FACE)
