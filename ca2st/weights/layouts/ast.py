"""Names of the audio spectrogram transformer."""

from ca2st.weights.layouts.layout import TIMM_LAYER, Layout
from ca2st.weights.published_tables import Names

_ORIGINAL = Layout(
    name="AST",
    prefixes=("module.v.", "v."),
    marker="blocks.0.attn.qkv.weight",
    once=Names(
        modules={"patch_embed.proj": "patch_embed", "norm": "norm"},
        tensors={"cls_token": "class_token", "dist_token": "distillation_token", "pos_embed": "positions"},
    ),
    layer_prefix="blocks.",
    layer=TIMM_LAYER,
    ignored=(
        "module.mlp_head.*",
        "mlp_head.*",
        "module.v.head.*",
        "module.v.head_dist.*",
        "v.head.*",
        "v.head_dist.*",
    ),
)
"""AST's own head, and the ImageNet heads of the DeiT inside it, are left aside."""

_HUGGING_FACE_ONCE = Names(
    modules={"embeddings.patch_embeddings.projection": "patch_embed", "layernorm": "norm"},
    tensors={
        "embeddings.cls_token": "class_token",
        "embeddings.distillation_token": "distillation_token",
        "embeddings.position_embeddings": "positions",
    },
)
_HUGGING_FACE_PREFIXES = ("audio_spectrogram_transformer.", "")

_HUGGING_FACE = Layout(
    name="Hugging Face ASTModel",
    prefixes=_HUGGING_FACE_PREFIXES,
    marker="encoder.layer.0.attention.attention.query.weight",
    once=_HUGGING_FACE_ONCE,
    layer_prefix="encoder.layer.",
    layer=Names(
        modules={
            "layernorm_before": "norm1",
            "attention.output.dense": "attention.proj",
            "layernorm_after": "norm2",
            "intermediate.dense": "mlp.fc1",
            "output.dense": "mlp.fc2",
        }
    ),
    joined={
        f"attention.qkv.{what}": tuple(f"attention.attention.{part}.{what}" for part in ("query", "key", "value"))
        for what in ("weight", "bias")
    },
    ignored=("classifier.*",),
)
"""As published."""

_HUGGING_FACE_5 = Layout(
    name="Hugging Face ASTModel (transformers 5)",
    prefixes=_HUGGING_FACE_PREFIXES,
    marker="layers.0.attention.q_proj.weight",
    once=_HUGGING_FACE_ONCE,
    layer_prefix="layers.",
    layer=Names(
        modules={
            "layernorm_before": "norm1",
            "attention.o_proj": "attention.proj",
            "layernorm_after": "norm2",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
        }
    ),
    joined={
        f"attention.qkv.{what}": tuple(f"attention.{part}_proj.{what}" for part in "qkv") for what in ("weight", "bias")
    },
    ignored=("classifier.*",),
)
"""As transformers 5 names the modules in memory."""

AST_LAYOUTS = (_ORIGINAL, _HUGGING_FACE, _HUGGING_FACE_5)
