"""Size and cost of a model without building it, and what its cross-attention listened to.

Parameters and multiply-adds are counted part by part on the meta device.

Attention is recorded while the model runs as it always does. The forward pass goes through
scaled_dot_product_attention, which keeps no weights. Here they are computed a second time from the queries and keys
that the module saw, a chunk at a time, and only their sums are kept: the model's output changes by rounding at most,
and no score matrix is ever held whole.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ca2st.model.attention import CrossAttention, into_windows
from ca2st.model.config import Direction, ModelConfig, TargetSpec, Trainable
from ca2st.model.layers import DirectedAttention
from ca2st.model.network import HolisticModel, build_model, set_trainable, whole_last_layer
from ca2st.model.tokens import audio_patches
from ca2st.spec import ClipSpec

FLOP_PER_MULTIPLY_ADD = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class PartInfo:
    """One part of a model, its numbers of parameters and its cost."""

    name: str
    """`spatial expert`, `adapters`, `bottleneck cross-attention`, ..."""
    trainable: int
    total: int
    gmacs: float
    """10^9 multiply-adds of the forward pass of one view."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """A model and its parts; the numbers of the parts add up to those of the model."""

    trainable: int
    """Trained parameters (without the LayerNorm that the reference trains and never uses)."""
    total: int
    gmacs: float
    """10^9 multiply-adds of the forward pass of one view, as published: convolutions, Linears and attention."""
    computed_gmacs: float
    """The same without what reaches no output in the last layer, which is not computed."""
    parts: tuple[PartInfo, ...]
    """Experts first, then what is added."""


def model_info(
    config: ModelConfig, clip: ClipSpec, targets: Sequence[TargetSpec], *, trainable: Trainable = "added"
) -> ModelInfo:
    """Count parameters and multiply-adds without allocating weights, when what `trainable` names is trained.

    Raises:
        UserInputError: sizes of clip and model do not fit, or the targets or what is to be trained are not usable.
    """
    with torch.device("meta"):
        model = build_model(config, clip, targets)
    set_trainable(model, trainable)
    return info_of(model)


def info_of(outline: HolisticModel) -> ModelInfo:
    """Count parameters and multiply-adds of a model on the meta device."""
    computed = _multiply_adds(outline)
    with whole_last_layer(outline):
        macs = _multiply_adds(outline)
    trained: Counter[str | None] = Counter()
    total: Counter[str | None] = Counter()
    for name, parameter in outline.named_parameters():
        total[_part_of(name)] += parameter.numel()
        trained[_part_of(name)] += parameter.numel() if parameter.requires_grad else 0
    parts = tuple(
        PartInfo(name=part, trainable=trained[part], total=total[part], gmacs=macs[part] / 1e9)
        for part in _PARTS
        if total[part]
    )
    return ModelInfo(
        trainable=sum(trained.values()),
        total=sum(total.values()),
        gmacs=sum(macs.values()) / 1e9,
        computed_gmacs=sum(computed.values()) / 1e9,
        parts=parts,
    )


_PARTS = {
    "spatial expert": re.compile(r"experts\.spatial\b"),
    "temporal expert": re.compile(r"experts\.temporal\b"),
    "audio expert": re.compile(r"experts\.audio\b"),
    "adapters": re.compile(r"layers\.\d+\.adapters\b"),
    "bottleneck cross-attention": re.compile(r"layers\.\d+\.(?:bottlenecks|bridges)\b"),
    "time codes": re.compile(r"time_codes\b"),
    "head": re.compile(r"head\b"),
}
"""Parts, in the order of printing, and how the names of their modules and parameters begin."""


def train_tflop(info: ModelInfo, *, again: bool) -> float:
    """Return 10^12 operations to train a clip: forward, backward to the first trained part, their weights' gradients.

    `again`: layers are computed again for their gradients.
    """
    computed = info.computed_gmacs / info.gmacs  # of the last layer only what reaches an output
    whole = info.computed_gmacs
    trained = computed * sum(part.gmacs * part.trainable / part.total for part in info.parts)
    head = sum(part.gmacs for part in info.parts if part.name == "head")
    only_head = all(part.trainable == 0 for part in info.parts if part.name != "head")
    backward = (head if only_head else whole) + trained
    return FLOP_PER_MULTIPLY_ADD * (whole + backward + (whole if again and not only_head else 0)) / 1e3


def _part_of(name: str) -> str | None:
    return next((part for part, pattern in _PARTS.items() if pattern.match(name)), None)


class _Meter:
    """Charges the multiply-adds done since the last event to the innermost part that is running."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self.macs: Counter[str] = Counter()
        self._counter = counter
        self._seen = 0
        self._running: list[str] = []

    def enter(self, part: str, *_: object) -> None:
        self._charge()
        self._running.append(part)

    def leave(self, *_: object) -> None:
        self._charge()
        self._running.pop()

    def _charge(self) -> None:
        now = self._counter.get_total_flops() // FLOP_PER_MULTIPLY_ADD
        if now > self._seen:
            self.macs[self._running[-1]] += now - self._seen
        self._seen = now


def _multiply_adds(model: HolisticModel) -> Counter[str]:
    clip, frames = model.clip, model.clip.num_frames
    counter = FlopCounterMode(display=False)
    meter = _Meter(counter)
    with ExitStack() as hooks, torch.device("meta"), torch.no_grad():
        for name, module in model.named_modules():
            if (part := _part_of(name)) is not None:
                hooks.callback(module.register_forward_pre_hook(partial(meter.enter, part)).remove)
                hooks.callback(module.register_forward_hook(meter.leave).remove)
        inputs = (
            torch.empty(1, 3, frames, clip.crop_size, clip.crop_size),
            torch.empty(1, clip.mel_rows, clip.num_mel_bins),
            torch.empty(1, 1 + frames // 2, 2),
        )
        with counter:
            model(*inputs)
    return meter.macs


_MOST_SCORES = 2**22
"""Attention weights held at a time: 16 MiB of float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionMap:
    """Attention of one direction X2Y in one layer for a batch of clips.

    Times and places are those of the picture: a visual token's frame pair and its patch; an audio token's column of
    spectrogram patches and its row (0 = the lowest frequencies).
    """

    layer: int
    """Counted from 1, as in the configuration."""
    direction: Direction
    """Who reads whose tokens, and in which window."""
    given: Float[Tensor, "batch query_times key_times key_places"]
    """Share of its attention that a query gives to each key: mean over heads and over the queries of that time. Each
    query time sums to one; keys outside a query's window get nothing from it. float32, on the CPU."""
    entropy_bits: Float[Tensor, " batch"]
    """Mean over heads and queries; 0 = one key takes all, log2(num_keys) = every key gets the same."""
    num_keys: int
    """Keys that a query sees: those of its window."""

    @property
    def received(self) -> Float[Tensor, "batch key_times key_places"]:
        """Return the share of all attention that each key received; a clip sums to one."""
        return self.given.mean(dim=1)

    @property
    def by_time(self) -> Float[Tensor, "batch query_times key_times"]:
        """Return the share that the queries of each time gave to the keys of each time; rows sum to one."""
        return self.given.sum(dim=-1)

    @property
    def entropy_share(self) -> Float[Tensor, " batch"]:
        """Return the entropy as a share of its maximum; 1 where there is only one key to attend to."""
        if self.num_keys == 1:
            return torch.ones_like(self.entropy_bits)
        return self.entropy_bits / math.log2(self.num_keys)


class TokenPlaces(NamedTuple):
    """Where in time and picture the tokens of a flattened grid of frames x patches lie."""

    cells: Int[Tensor, " tokens"]
    """Index of each token in a grid of times x places."""
    num_times: int
    num_places: int


def visual_places(num_frames: int, num_patches: int) -> TokenPlaces:
    """Return the places of tokens laid out frame by frame."""
    return TokenPlaces(torch.arange(num_frames * num_patches), num_frames, num_patches)


def audio_places(num_rows: int, num_columns: int) -> TokenPlaces:
    """Return the places of spectrogram patches, row by row: the column is the time."""
    cells = rearrange(torch.arange(num_columns * num_rows), "(t f) -> (f t)", f=num_rows)
    return TokenPlaces(cells, num_columns, num_rows)


@contextmanager
def record_attention(model: HolisticModel) -> Iterator[list[AttentionMap]]:
    """Record every cross-attention of the forward passes inside the block.

    The list grows with each pass: by layer, and inside a layer in the order of computation. It stays empty for a model
    without cross-attention. Run the model itself inside, not a compiled or wrapped copy, whose hooks may not fire. The
    last layer runs whole inside, so that its idle directions are seen too.
    """
    maps: list[AttentionMap] = []
    with ExitStack() as hooks:
        hooks.enter_context(whole_last_layer(model))
        for number, layer in enumerate(model.layers, start=1):
            for module in layer.modules():
                if isinstance(module, DirectedAttention):
                    hook = partial(_record, model, number, module.direction, maps)
                    hooks.callback(module.attention.register_forward_hook(hook).remove)
        yield maps


def has_cross_attention(model: HolisticModel) -> bool:
    """Return whether there is anything that `record_attention` could record."""
    return any(isinstance(module, DirectedAttention) for module in model.layers.modules())


@torch.no_grad()
def _record(
    model: HolisticModel,
    layer: int,
    direction: Direction,
    maps: list[AttentionMap],
    attention: nn.Module,
    inputs: tuple[Tensor, Tensor],
    _: Tensor,
) -> None:
    """Append the map of one direction of one layer; the last three arguments are those of a forward hook."""
    assert isinstance(attention, CrossAttention)
    query_places, key_places = (
        audio_places(*audio_patches(model.config, model.clip))
        if expert == "audio"
        else visual_places(patches.shape[1], patches.shape[2])
        for expert, patches in zip((direction.queries, direction.keys), inputs, strict=True)
    )
    given, entropy, num_keys = attend(attention, *inputs, query_places=query_places, key_places=key_places)
    maps.append(
        AttentionMap(layer=layer, direction=direction, given=given.cpu(), entropy_bits=entropy.cpu(), num_keys=num_keys)
    )


def attend(
    attention: CrossAttention,
    queries: Float[Tensor, "batch query_frames query_patches dim"],
    keys: Float[Tensor, "batch key_frames key_patches dim"],
    *,
    query_places: TokenPlaces,
    key_places: TokenPlaces,
) -> tuple[Float[Tensor, "batch query_times key_times key_places"], Float[Tensor, " batch"], int]:
    """softmax(q k^T / sqrt(head_dim)) inside `attention`'s window: (given, entropy in bits, keys of a window).

    As in `AttentionMap`, on the device of the inputs; the softmax is computed in float32.
    """
    q, k, _ = (
        rearrange(x.float(), "(b w) h n e -> b h w n e", b=queries.shape[0])
        for x in attention.projections(queries, keys)
    )
    query_tokens, key_tokens = window_tokens(attention, queries.shape[1:3], keys.shape[1:3])
    times = (query_places.cells[query_tokens] // query_places.num_places).to(q.device)
    cells = key_places.cells[key_tokens].to(q.device)
    num_cells = key_places.num_times * key_places.num_places
    given = q.new_zeros(q.shape[0], query_places.num_times * num_cells)
    entropy = q.new_zeros(q.shape[0])
    for windows, part in _chunks(q, num_keys=k.shape[3]):
        with torch.autocast(q.device.type, enabled=False):  # the model may run under it; the maps stay float32
            scores = q[:, :, windows, part] @ k[:, :, windows].transpose(-1, -2) * q.shape[-1] ** -0.5
            weights = scores.softmax(dim=-1)
        entropy += torch.special.entr(weights).sum(dim=(1, 2, 3, 4))
        slots = times[windows, part, None] * num_cells + cells[windows, None, :]
        given.index_add_(1, slots.flatten(), weights.mean(dim=1).flatten(start_dim=1))
    given = rearrange(given, "b (q t p) -> b q t p", q=query_places.num_times, p=key_places.num_places)
    num_queries = query_tokens.numel()
    return (
        given / (num_queries / query_places.num_times),
        entropy / (math.log(2) * attention.num_heads * num_queries),
        key_tokens.shape[1],
    )


def window_tokens(
    attention: CrossAttention, query_grid: Sequence[int], key_grid: Sequence[int]
) -> tuple[Int[Tensor, "windows queries"], Int[Tensor, "windows keys"]]:
    """Return flat indices of the tokens of each window; grids are (frames, patches).

    The model's own rearrangement is applied to the tokens' numbers, so it cannot be another one.
    """

    def tokens(grid: Sequence[int]) -> Tensor:
        numbers = torch.arange(math.prod(grid), dtype=torch.float64).view(1, *grid, 1)
        grouped = into_windows(
            numbers,
            attention.window,
            num_heads=1,
            num_places=min(query_grid[1], key_grid[1]),
            grouping=attention.grouping,
        )
        return rearrange(grouped, "windows 1 tokens 1 -> windows tokens").long()

    return tokens(query_grid), tokens(key_grid)


def _chunks(
    q: Float[Tensor, "batch heads windows queries head_dim"], *, num_keys: int
) -> Iterator[tuple[slice, slice]]:
    """Yield slices of windows and queries: parts that make at most `_MOST_SCORES` weights, or a single query."""
    batch, heads, num_windows, num_queries, _ = q.shape
    queries_at_once = max(1, _MOST_SCORES // (batch * heads * num_keys))
    windows_at_once = max(1, queries_at_once // num_queries)
    for window in range(0, num_windows, windows_at_once):
        for query in range(0, num_queries, queries_at_once):
            yield slice(window, window + windows_at_once), slice(query, query + queries_at_once)
