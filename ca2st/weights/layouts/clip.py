"""Names of CLIP's visual half. Which activation was trained is not written in any of them: ours is QuickGELU."""

from ca2st.weights.layouts.layout import TIMM_LAYER, Layout
from ca2st.weights.published_tables import Names

_ORIGINAL = Layout(
    name="CLIP",
    prefixes=("module.visual.", "visual.", ""),
    marker="transformer.resblocks.0.attn.in_proj_weight",
    once=Names(
        modules={"ln_pre": "norm_pre", "ln_post": "norm"},
        tensors={
            "conv1.weight": "patch_embed.weight",
            "class_embedding": "class_token",
            "positional_embedding": "positions",
        },
    ),
    layer_prefix="transformer.resblocks.",
    layer=Names(
        modules={
            "ln_1": "norm1",
            "attn.out_proj": "attention.proj",
            "ln_2": "norm2",
            "mlp.c_fc": "mlp.fc1",
            "mlp.c_proj": "mlp.fc2",
        },
        tensors={"attn.in_proj_weight": "attention.qkv.weight", "attn.in_proj_bias": "attention.qkv.bias"},
    ),
    ignored=tuple(
        f"{prefix}{name}"
        for prefix in ("", "module.")
        for name in (
            "visual.proj",
            "proj",
            "transformer.*",
            "token_embedding.weight",
            "positional_embedding",
            "ln_final.*",
            "text_projection",
            "logit_scale",
            "logit_bias",
            "attn_mask",
            "input_resolution",
            "context_length",
            "vocab_size",
        )
    ),
)
"""OpenAI's archive and open_clip: the projection into the joint space and the text half are left aside."""

_HUGGING_FACE = Layout(
    name="Hugging Face CLIPVisionModel",
    prefixes=("vision_model.", ""),
    marker="encoder.layers.0.self_attn.q_proj.weight",
    once=Names(
        modules={"pre_layrnorm": "norm_pre", "post_layernorm": "norm"},
        tensors={
            "embeddings.patch_embedding.weight": "patch_embed.weight",
            "embeddings.class_embedding": "class_token",
            "embeddings.position_embedding.weight": "positions",
        },
    ),
    layer_prefix="encoder.layers.",
    layer=Names(
        modules={
            "layer_norm1": "norm1",
            "self_attn.out_proj": "attention.proj",
            "layer_norm2": "norm2",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
        }
    ),
    joined={
        f"attention.qkv.{what}": tuple(f"self_attn.{part}_proj.{what}" for part in "qkv") for what in ("weight", "bias")
    },
    ignored=(
        "text_model.*",
        "visual_projection.weight",
        "text_projection.weight",
        "logit_scale",
        "embeddings.position_ids",
        "vision_model.embeddings.position_ids",
    ),
)

_TIMM = Layout(
    name="timm's CLIP",
    prefixes=("",),
    marker="norm_pre.weight",
    once=Names(
        modules={"norm_pre": "norm_pre", "norm": "norm"},
        tensors={"patch_embed.proj.weight": "patch_embed.weight", "cls_token": "class_token", "pos_embed": "positions"},
    ),
    layer_prefix="blocks.",
    layer=TIMM_LAYER,
    ignored=("head.*",),
)
"""The visual half as timm keeps it in its repositories; the head is the projection into the joint space."""

CLIP_LAYOUTS = (_ORIGINAL, _HUGGING_FACE, _TIMM)
