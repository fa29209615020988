"""Which tensors of a whole model are position tables, what grid each belongs to, and its form for another clip."""

import re
from dataclasses import dataclass

from torch import Tensor

from ca2st.model.config import EncoderName, ModelConfig
from ca2st.model.positions import resize_time_table
from ca2st.model.structure import all_bridges, encoder_of
from ca2st.model.tokens import NUM_AUDIO_PREFIX, audio_patches
from ca2st.spec import ClipSpec
from ca2st.weights.audio_positions import fit_audio_positions
from ca2st.weights.image_positions import NUM_CLIP_PREFIX, fit_image_positions, square_side

_EXPERT_TABLE = re.compile(r"experts\.(?P<expert>[^.]+)\.positions")
_BRIDGE_TABLE = re.compile(
    r"layers\.\d+\.bridges\.(?P<bridge>[^.]+)\.directions\.(?P<direction>[^.]+)"
    r"\.(?P<side>query|key)_positions\.(?P<axis>time|space)_table"
)
_PREFIX: dict[EncoderName, int] = {"clip": NUM_CLIP_PREFIX, "ast": NUM_AUDIO_PREFIX}


def is_position_table(name: str) -> bool:
    """Whether a tensor of a whole model depends on the clip: the experts' learned positions and those of B-CA."""
    return bool(_EXPERT_TABLE.fullmatch(name) or _BRIDGE_TABLE.fullmatch(name))


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionFitter:
    """Position tables of a model for the clip `source`, and their form for `clip`."""

    config: ModelConfig
    """Structure, the same in both."""
    clip: ClipSpec
    """What tables are wanted for."""
    source: ClipSpec
    """What they were made for."""
    where: str
    """The source, in messages."""

    def differs(self, name: str, table: Tensor, *, rows: int) -> bool:
        """Whether a table is for another grid than the one wanted, which has `rows` rows in it.

        A spectrogram's grid is compared by its columns: what is not a matter of the clip, such as another width, is
        left to the strict comparison of shapes.
        """
        encoder, axis, _ = self._place(name)
        if encoder == "ast" and axis == "space":
            ours, theirs = audio_patches(self.config, self.clip), audio_patches(self.config, self.source)
            return table.ndim == 2 and ours[0] == theirs[0] and ours[1] != theirs[1]
        return table.ndim == 2 and table.shape[0] != rows

    def fit(self, name: str, table: Tensor, *, rows: int) -> Tensor:
        """The table with `rows` rows; unchanged where neither it nor what is wanted is a grid."""
        encoder, axis, num_prefix = self._place(name)
        if axis == "time":
            return resize_time_table(table, rows)
        if encoder == "ast":
            frequencies, columns = audio_patches(self.config, self.clip)
            return fit_audio_positions(
                table, rows=frequencies, columns=columns, num_prefix=num_prefix, where=f"{self.where}: {name}"
            )
        side = square_side(rows - num_prefix)
        if side is None or square_side(table.shape[0] - num_prefix) is None:
            return table
        return fit_image_positions(table, side=side, num_prefix=num_prefix)

    def _place(self, name: str) -> tuple[EncoderName, str, int]:
        """Encoder whose tokens the table is for, its axis, and the rows before the patches."""
        if match := _EXPERT_TABLE.fullmatch(name):
            encoder = encoder_of(self.config, match["expert"])
            return encoder, "space", _PREFIX.get(encoder, 0)
        found = _BRIDGE_TABLE.fullmatch(name)
        assert found is not None
        bridges = {bridge.name: bridge for bridge in all_bridges(self.config)}
        directions = {direction.name: direction for direction in bridges[found["bridge"]].directions}
        direction = directions[found["direction"]]
        expert = direction.queries if found["side"] == "query" else direction.keys
        return encoder_of(self.config, expert), found["axis"], 0
