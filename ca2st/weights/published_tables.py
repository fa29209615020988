"""Names of the released CAST, CAVA and CA2ST checkpoints beside ours, as plain tables: published name -> our name.

The letters mislead: `S`/`s` is spatial and `T`/`t` temporal in the files of CAST and CA2ST, but audio and spatial in
those of CAVA. X2Y here always has keys from X and queries from Y; a published `s2t_cross` need not.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ca2st.model.config import ModelKind
from ca2st.model.structure import BridgeName, ExpertName


@dataclass(frozen=True, kw_only=True, slots=True)
class Names:
    """A table of names."""

    modules: Mapping[str, str]
    """Modules that have a `weight` and a `bias`."""
    tensors: Mapping[str, str] = field(default_factory=dict)
    """Single tensors."""

    def pairs(self) -> dict[str, str]:
        """Tensor names: published -> ours."""
        of_modules = {
            f"{theirs}.{k}": f"{ours}.{k}" for theirs, ours in self.modules.items() for k in ("weight", "bias")
        }
        return of_modules | dict(self.tensors)


EXPERT_NAMES: dict[ExpertName, Names] = {
    "spatial": Names(
        modules={"clip_ln_pre": "norm_pre", "clip_ln_post": "norm"},
        tensors={
            "clip_conv1.weight": "patch_embed.weight",
            "clip_class_embedding": "class_token",
            "clip_positional_embedding": "positions",
        },
    ),
    "temporal": Names(modules={"patch_embed.proj": "patch_embed", "vmae_fc_norm": "norm"}),
    "audio": Names(
        modules={"ast_patch_embed.proj": "patch_embed", "ast_norm": "norm"},
        tensors={
            "ast_cls_token": "class_token",
            "ast_dist_token": "distillation_token",
            "ast_pos_embed": "positions",
        },
    ),
}
"""Below `experts.<expert>.` in our names."""

EXPERT_LAYER_NAMES: dict[ExpertName, Names] = {
    "spatial": Names(
        modules={
            "clip_ln_1": "norm1",
            "clip_attn.out_proj": "attention.proj",
            "clip_ln_2": "norm2",
            "clip_mlp.c_fc": "mlp.fc1",
            "clip_mlp.c_proj": "mlp.fc2",
        },
        tensors={
            "clip_attn.in_proj_weight": "attention.qkv.weight",
            "clip_attn.in_proj_bias": "attention.qkv.bias",
        },
    ),
    "temporal": Names(
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
    "audio": Names(
        modules={
            "ast_norm1": "norm1",
            "ast_attn.qkv": "attention.qkv",
            "ast_attn.proj": "attention.proj",
            "ast_norm2": "norm2",
            "ast_mlp.fc1": "mlp.fc1",
            "ast_mlp.fc2": "mlp.fc2",
        }
    ),
}
"""Below `blocks.<i>.` in published names, `experts.<expert>.layers.<i>.` in ours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedDirection:
    """One direction of a published B-CA."""

    ours: str
    """Our name of the direction."""
    prefix: str
    """Before `q` and `kv`."""
    proj: str
    """The output projection: `t2s_proj` in both directions of S&T and A&S files, a misnomer frozen into them."""
    positions: Mapping[str, str] = field(default_factory=dict)
    """Learned position tables."""

    def names(self) -> Names:
        """Below the published direction and below ours."""
        return Names(
            modules={self.proj: "attention.proj"},
            tensors={
                f"{self.prefix}q.weight": "attention.q.weight",
                f"{self.prefix}q_bias": "attention.q.bias",
                f"{self.prefix}kv.weight": "attention.kv.weight",
                f"{self.prefix}kv_bias": "attention.kv.bias",
                **self.positions,
            },
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedBridge:
    """A published B-CA inside a block."""

    prefix: str
    """Before all its names."""
    sides: Mapping[str, ExpertName]
    """The letters of its two sides, in `cross_<letter>_down` and `ln_<letter>_cross`."""
    directions: Mapping[str, PublishedDirection]
    """Its two attentions."""


_T2S = PublishedDirection(
    ours="t2s",
    prefix="t2s_",
    proj="t2s_proj",
    positions={"clip_time_pos": "query_positions.time_table", "vmae_time_pos": "key_positions.time_table"},
)
_S2T = PublishedDirection(
    ours="s2t",
    prefix="s2t_",
    proj="t2s_proj",
    positions={"vmae_space_pos": "query_positions.space_table", "clip_space_pos": "key_positions.space_table"},
)


def _plain(ours: str) -> PublishedDirection:
    return PublishedDirection(ours=ours, prefix="", proj="proj")


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedLayout:
    """What differs between the files of the three models."""

    adapters: Mapping[str, ExpertName]
    """Prefix of `Adapter` and `MLP_Adapter` in a block."""
    bridges: Mapping[BridgeName, PublishedBridge]
    """The cross-attentions of a block."""
    time_mlp: Mapping[str, str]
    """Indices inside the two time MLPs."""
    last_adapters: Mapping[str, str]
    """Last adapters of a single-label model."""
    verb_noun_last_adapters: Mapping[str, str]
    """Last adapters of a verb + noun model."""


LAYOUTS: dict[ModelKind, PublishedLayout] = {
    "cast": PublishedLayout(
        adapters={"S_": "spatial", "T_": "temporal"},
        bridges={
            "spatial_temporal": PublishedBridge(
                prefix="",
                sides={"s": "spatial", "t": "temporal"},
                directions={"t2s_cross": _T2S, "s2t_cross": _S2T},
            )
        },
        time_mlp={},
        last_adapters={"noun_last_Adapter": "spatial", "verb_last_Adapter": "temporal"},
        verb_noun_last_adapters={},
    ),
    "cava": PublishedLayout(
        adapters={"S_": "audio", "T_": "spatial"},
        bridges={
            "audio_spatial": PublishedBridge(
                prefix="",
                sides={"s": "audio", "t": "spatial"},
                directions={
                    "s2t_cross": PublishedDirection(ours="a2s", prefix="s2t_", proj="t2s_proj"),
                    "t2s_cross": PublishedDirection(ours="s2a", prefix="t2s_", proj="t2s_proj"),
                },
            )
        },
        time_mlp={"0": "0", "2.0": "2", "3.0": "4", "4": "6"},
        last_adapters={"noun_last_Adapter": "audio", "verb_last_Adapter": "spatial"},
        verb_noun_last_adapters={"noun_last_Adapter": "audio", "verb_last_Adapter": "spatial"},
    ),
    "ca2st": PublishedLayout(
        adapters={"S_": "spatial", "T_": "temporal", "Audio_": "audio"},
        bridges={
            "spatial_temporal": PublishedBridge(
                prefix="s_t_b_cast.",
                sides={"l": "spatial", "r": "temporal"},
                directions={"r2l_cross": _T2S, "l2r_cross": _S2T},
            ),
            "audio_spatial": PublishedBridge(
                prefix="s_audio_b_cast.",
                sides={"l": "spatial", "r": "audio"},
                directions={"r2l_cross": _plain("a2s"), "l2r_cross": _plain("s2a")},
            ),
            "audio_temporal": PublishedBridge(
                prefix="t_audio_b_cast.",
                sides={"l": "temporal", "r": "audio"},
                directions={"r2l_cross": _plain("a2t"), "l2r_cross": _plain("t2a")},
            ),
        },
        time_mlp={"0": "0", "2": "2", "4": "4", "6": "6"},
        last_adapters={
            "noun_last_Adapter": "spatial",
            "verb_last_Adapter": "temporal",
            "audio_verb_last_Adapter": "audio",
        },
        verb_noun_last_adapters={
            "noun_last_Adapter": "spatial",
            "verb_last_Adapter": "temporal",
            "audio_verb_last_Adapter": "audio_verb",
            "audio_noun_last_Adapter": "audio_noun",
        },
    ),
}

ADAPTER_NAMES = {"D_fc1": "down", "D_fc2": "up"}
QUERY_ADAPTER_NAMES = {"c_fc": "down", "c_proj": "up"}
"""Inside the audio expert's last adapters in CA2ST."""
TIME_MLPS = {"time_mlp": "video", "audio_time_mlp": "audio"}
NEVER_USED = frozenset({"audio_ln_post.weight", "audio_ln_post.bias"})
"""A LayerNorm that the reference of CAVA and CA2ST trains and never applies; our models do not have it."""
