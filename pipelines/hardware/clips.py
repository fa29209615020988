"""Drawn clips in memory, stored as the converter stores them."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate, pairwise

import av
import torch

from ca2st.spec import ClipSpec
from pipelines.augment.config import AugmentConfig
from pipelines.backends import make_backend
from pipelines.benchmark.drawn_clips import DrawnClips, drawn_frames
from pipelines.draws import ClipFacts, TrainDraws
from pipelines.rendering import ClipFrames, JpegFrames, RenderRequest, VideoMember, ViewBackend
from pipelines.sampling import SamplingConfig
from pipelines.stats import StatsRecorder
from sharding.codecs import stored_codec
from sharding.encode import clip_encoder
from sharding.encoded_video import EncodedVideo
from sharding.index import TICKS_PER_SECOND
from sharding.stored_picture import PictureMaker
from sharding.video_cut import TimedFrame

RAND_AUGMENT = "rand-m7-n4-mstd0.5-inc1"
"""As published."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredClip:
    """A clip as a shard holds it."""

    key: str
    codec: str
    num_gop_frames: int | None
    video: EncodedVideo

    def frames(self, indices: tuple[int, ...]) -> ClipFrames:
        """What a reader gets for these frames."""
        if not stored_codec(self.codec).has_frame_ranges:
            return VideoMember(self.video.mp4, self.codec, indices)
        edges = list(accumulate(self.video.frame_bytes, initial=self.video.frame_data_offset))
        jpegs = [self.video.mp4[begin:end] for begin, end in pairwise(edges)]
        return JpegFrames(tuple(jpegs[index] for index in indices))


def stored_clips(codec: str, drawn: DrawnClips, *, num_gop_frames: int | None, threads: int) -> list[StoredClip]:
    """Drawn clips in a codec at its default quality; encoders work on `threads` threads, a clip each."""
    gop = None if stored_codec(codec).has_frame_ranges else num_gop_frames

    def one(seed: int) -> StoredClip:
        return StoredClip(key=f"drawn-{seed}", codec=codec, num_gop_frames=gop, video=_encoded(codec, drawn, seed, gop))

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, range(drawn.count)))


def _encoded(codec: str, drawn: DrawnClips, seed: int, gop: int | None) -> EncodedVideo:
    encoder = clip_encoder(
        codec,
        pictures=PictureMaker(codec, short_side=min(drawn.width, drawn.height)),
        quality=stored_codec(codec).default_quality,
        num_gop_frames=gop,
        ticks_per_second=TICKS_PER_SECOND,
    )
    step = Fraction(1, drawn.frames_per_second)
    for number, frame in enumerate(drawn_frames(drawn, seed=seed)):
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        encoder.add(TimedFrame(picture=picture, seconds=number * step, duration=step))
    return encoder.finish()


def training_requests(
    clips: Sequence[StoredClip], spec: ClipSpec, *, count: int, rand_augment: bool
) -> list[RenderRequest]:
    """`count` training views of the clips, taking turns: random crop and flip, and RandAugment as published."""
    augment = AugmentConfig(rand_augment=RAND_AUGMENT if rand_augment else None)
    draws = TrainDraws(clip=spec, sampling=SamplingConfig(), augment=augment, seed=0, epoch=0)
    requests = []
    for number in range(count):
        clip = clips[number % len(clips)]
        ticks = clip.video.frame_ticks
        facts = ClipFacts(key=clip.key, num_frames=len(ticks), frames_per_second=30.0, mel_rows=spec.mel_rows)
        (view,) = draws.views(facts, repeat=number // len(clips))
        requests.append(
            RenderRequest(
                frames=clip.frames(view.frame_indices),
                boxes=(view.crop.box(height=clip.video.height, width=clip.video.width),),
                flip=view.flip,
                augment=view.augment,
                where=f"drawn clip {clip.key} in {clip.codec}",
            )
        )
    return requests


def plain(request: RenderRequest) -> RenderRequest:
    """The same clip without flip, RandAugment and erasing."""
    return replace(request, flip=False, augment=None, erased=())


def backend_on(
    device: torch.device, codec: str, spec: ClipSpec, *, threads: int, stats: StatsRecorder | None = None
) -> ViewBackend:
    """What a loader would take for `codec` on `device`."""
    return make_backend(
        "auto",
        codecs=(codec,),
        num_frames=spec.num_frames,
        crop_size=spec.crop_size,
        views_per_clip=1,
        threads=threads,
        stats=stats or StatsRecorder(),
        device=device,
    )
