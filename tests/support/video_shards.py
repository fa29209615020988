"""Converted shard sets of small clips in any codec, in this process: no decode child, no sound."""

from pathlib import Path
from typing import Any

from sharding.format.shard_set import ShardSet, read_shard_set, write_shard_set
from sharding.format.writer import ShardRange, StoredSample, write_shard
from sharding.media.encode import EncodedClip, encode_clip
from sharding.settings import ConversionConfig, conversion_identity
from sharding.shard_task import assemble
from sharding.source import SourceList
from support.shards import sample, small_config, source_list


def encoded(path: Path, **options: Any) -> EncodedClip:
    """One clip as the converter stores it."""
    return encode_clip(small_config(**options).job(sample(path)))


def video_shard_set(root: Path, clips: list[Path], codec: str, **options: Any) -> ShardSet:
    """The clips as one shard of `codec`, labelled 0 and 1 in turn."""
    source = source_list([sample(path, label=number % 2) for number, path in enumerate(clips)])
    config = small_config(codec=codec, **options)
    root.mkdir(parents=True)
    entry = write_shard(
        root,
        0,
        [stored(source, number, config) for number in range(len(clips))],
        covers=lambda: ShardRange(first=0, end=len(clips), rejects=()),
        conversion=conversion_identity(source, config),
    )
    fields = {
        "dataset": source.dataset,
        "split": source.split,
        "label_spaces": source.label_spaces,
        "targets": source.targets,
        "audio": config.audio,
        "video": config.video,
        "tool_versions": {},
        "source_list_sha256": source.sha256,
        "rejected": {},
    }
    write_shard_set(root, fields, (entry,))
    return read_shard_set(root)


def stored(source: SourceList, position: int, config: ConversionConfig) -> StoredSample:
    """A sample of the list, ready to be written; a clip that is rejected fails the test."""
    one = source.samples[position]
    outcome = assemble(position, one, encode_clip(config.job(one)), source, config)
    assert isinstance(outcome, StoredSample), outcome
    return outcome
