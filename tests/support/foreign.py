"""Checkpoints as others write them, made from the weights of a tiny expert of ours, name by name."""

import argparse
import os
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ca2st.model.experts import Expert
from ca2st.spec import ClipSpec
from ca2st.weights import foreign
from ca2st.weights.foreign import ReadJob
from support.models import TINY_CLIP, tiny_model, wake

DEPTH = 2


def awake_expert(name: str, *, clip: ClipSpec = TINY_CLIP) -> Expert:
    """A tiny expert none of whose weights is zero by chance."""
    model = tiny_model(name, clip=clip, adapters=False)
    wake(model)
    return model.experts[name]  # type: ignore[index]  # tests pass plain strings


def _layers(ours: dict[str, Tensor], theirs: str, pairs: dict[str, str]) -> dict[str, Tensor]:
    return {
        theirs.format(i) + name: ours[f"layers.{i}.{own}"].clone() for i in range(DEPTH) for name, own in pairs.items()
    }


def _modules(pairs: dict[str, str]) -> dict[str, str]:
    return {f"{a}.{kind}": f"{b}.{kind}" for a, b in pairs.items() for kind in ("weight", "bias")}


def clip_state(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names below `visual.` in OpenAI's and open_clip's files."""
    pairs = _modules(
        {
            "ln_1": "norm1",
            "attn.out_proj": "attention.proj",
            "ln_2": "norm2",
            "mlp.c_fc": "mlp.fc1",
            "mlp.c_proj": "mlp.fc2",
        }
    )
    pairs |= {"attn.in_proj_weight": "attention.qkv.weight", "attn.in_proj_bias": "attention.qkv.bias"}
    return {
        "conv1.weight": ours["patch_embed.weight"],
        "class_embedding": ours["class_token"],
        "positional_embedding": ours["positions"],
        "ln_pre.weight": ours["norm_pre.weight"],
        "ln_pre.bias": ours["norm_pre.bias"],
        "ln_post.weight": ours["norm.weight"],
        "ln_post.bias": ours["norm.bias"],
        "proj": torch.ones(ours["class_token"].shape[0], 8),
        **_layers(ours, "transformer.resblocks.{}.", pairs),
    }


def open_clip_state(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole two-tower file."""
    text = {
        "positional_embedding": torch.ones(7, 8),
        "text_projection": torch.ones(8, 8),
        "logit_scale": torch.ones(()),
        "token_embedding.weight": torch.ones(9, 8),
        "ln_final.weight": torch.ones(8),
        "ln_final.bias": torch.ones(8),
        "transformer.resblocks.0.attn.in_proj_weight": torch.ones(24, 8),
    }
    return {f"visual.{name}": tensor for name, tensor in clip_state(ours).items()} | text


def videomae_state(ours: dict[str, Tensor], *, prefix: str = "", norm: str = "fc_norm") -> dict[str, Tensor]:
    """Names of a fine-tuned (`fc_norm`, head) or pretrained (`encoder.`, `norm`, decoder) VideoMAE."""
    pairs = _modules(
        {"norm1": "norm1", "attn.proj": "attention.proj", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    )
    pairs |= {
        "attn.qkv.weight": "attention.qkv.weight",
        "attn.q_bias": "attention.q_bias",
        "attn.v_bias": "attention.v_bias",
    }
    state = {
        "patch_embed.proj.weight": ours["patch_embed.weight"],
        "patch_embed.proj.bias": ours["patch_embed.bias"],
        f"{norm}.weight": ours["norm.weight"],
        f"{norm}.bias": ours["norm.bias"],
        **_layers(ours, "blocks.{}.", pairs),
    }
    others = {"decoder.norm.weight": torch.ones(4), "encoder_to_decoder.weight": torch.ones(4, 4)}
    if prefix != "encoder.":
        others = {"head.weight": torch.ones(3, 32), "head.bias": torch.ones(3)}
    return {f"{prefix}{name}": tensor for name, tensor in state.items()} | others


def ast_state(ours: dict[str, Tensor], *, positions: Tensor | None = None) -> dict[str, Tensor]:
    """Names of the official AST file."""
    pairs = _modules(
        {
            "norm1": "norm1",
            "attn.qkv": "attention.qkv",
            "attn.proj": "attention.proj",
            "norm2": "norm2",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
        }
    )
    state = {
        "cls_token": ours["class_token"].reshape(1, 1, -1),
        "dist_token": ours["distillation_token"].reshape(1, 1, -1),
        "pos_embed": (ours["positions"] if positions is None else positions).unsqueeze(0),
        "patch_embed.proj.weight": ours["patch_embed.weight"],
        "patch_embed.proj.bias": ours["patch_embed.bias"],
        "norm.weight": ours["norm.weight"],
        "norm.bias": ours["norm.bias"],
        "head.weight": torch.ones(5, 32),
        "head_dist.weight": torch.ones(5, 32),
        **_layers(ours, "blocks.{}.", pairs),
    }
    head = {"module.mlp_head.0.weight": torch.ones(32), "module.mlp_head.1.weight": torch.ones(5, 32)}
    return {f"module.v.{name}": tensor for name, tensor in state.items()} | head


def training_checkpoint(state: dict[str, Tensor], *, key: str = "model") -> dict[str, Any]:
    """What a training program saves: weights among options, numbers and the state of an optimizer."""
    import numpy as np

    return {
        key: state,
        "args": argparse.Namespace(lr=1e-3, name="finetune"),
        "epoch": 7,
        "max_accuracy": np.float64(81.5),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]},
    }


class _Tree(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def torchscript_archive(path: Path, state: dict[str, Tensor]) -> Path:
    """A scripted module tree with these parameters."""
    root = _Tree()
    for name, tensor in state.items():
        *folders, leaf = name.split(".")
        module: nn.Module = root
        for folder in folders:
            if folder not in module._modules:
                module.add_module(folder, _Tree())
            module = module._modules[folder]  # type: ignore[assignment]  # just added
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # old files are still written so
        torch.jit.script(root).save(str(path))
    return path


def say_and_sleep(connection: Connection, job: ReadJob) -> None:
    """The whole life of the child that reads a foreign file, but that reading prints its number and never ends."""

    def answer(_path: Path, _out: Path) -> dict[str, str]:
        print(os.getpid(), flush=True)
        time.sleep(600)
        return {}

    foreign.answer = answer
    foreign.serve(connection, job)
