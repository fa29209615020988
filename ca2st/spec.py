"""What a clip looks like when it reaches the model: the sizes that loader and model must agree on."""

from dataclasses import dataclass

from ca2st.errors import UserInputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MEL_ROW_SECONDS = 0.010
"""Time from one spectrogram row to the next: the 10 ms frame shift of the Kaldi filter bank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipSpec:
    """Sizes of one view of a clip."""

    num_frames: int = 16
    """Frames given to the temporal expert; the spatial expert reads every second one. Even."""
    crop_size: int = 224
    """Height and width of a frame in pixels."""
    mel_rows: int = 400
    """Rows (10 ms each) of the spectrogram crop: 400 for EPIC-SOUNDS, 1024 for VGG-Sound."""
    num_mel_bins: int = 128
    """Mel bins of a spectrogram row, as written in the shards."""

    def __post_init__(self) -> None:
        if self.num_frames < 2 or self.num_frames % 2:
            raise UserInputError(f"num_frames: expected an even number >= 2, found {self.num_frames}")
        for name in ("crop_size", "mel_rows", "num_mel_bins"):
            if getattr(self, name) < 16:
                raise UserInputError(f"{name}: expected at least one 16-wide patch, found {getattr(self, name)}")
