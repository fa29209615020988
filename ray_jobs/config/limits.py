"""Counts beyond which a recipe's number is a slip of the hand: nothing would fail at once, and nothing would end."""

from collections.abc import Iterator, Mapping
from typing import Any

_MOST_OF_ANY = 10**12
_UNBOUNDED = ("seed", "_seed", "_bytes")
"""Keys that end so may hold any number that their own section takes."""
MOST: Mapping[str, int] = {
    "clip.num_frames": 4_096,
    "clip.crop_size": 8_192,
    "clip.mel_rows": 1_000_000,
    "clip.num_mel_bins": 8_192,
    "data.augment.erasing.most_boxes": 100,
    "data.augment.spectrogram.frequency_masks": 100,
    "data.augment.spectrogram.time_masks": 100,
    "data.epoch_samples": 1_000_000_000,
    "data.loader.decode_threads": 4_096,
    "data.loader.fetch_threads": 4_096,
    "data.loader.prefetch_steps": 1_000,
    "data.loader.retry.attempts": 1_000,
    "data.repeats": 1_000,
    "data.sampling.frame_stride": 10_000,
    "data.views.clips": 1_000,
    "data.views.crops": 1_000,
    "launch.threads_per_worker": 4_096,
    "launch.workers": 100_000,
    "model.depth": 1_000,
    "model.dim": 65_536,
    "model.num_heads": 1_024,
    "training.epochs": 1_000_000,
    "training.global_batch_size": 10_000_000,
    "training.keep_checkpoints": 1_000_000,
    "training.per_device_batch_size": 1_000_000,
}
"""Most of each count, far above anything that has been trained."""


def beyond_limits(leaves: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with whole numbers among a recipe's settings by dotted path, one text a key."""
    for path, value in leaves.items():
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        most = MOST.get(path, _MOST_OF_ANY)
        if value > most and not path.endswith(_UNBOUNDED):
            yield f"{path}: expected at most {most:,}, found {value}; a count beyond that is a slip"
