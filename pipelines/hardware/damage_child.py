"""The process of one `DamageTrial`: decode a damaged clip, and say on stdout, as JSON, what came out.

Arguments: device, codec, the clip before and after the damage, frames and pixels of a view.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from ca2st.errors import CA2STError
from ca2st.spec import ClipSpec
from pipelines.augment.crops import CropBox
from pipelines.decode.reference import ReferenceBackend
from pipelines.hardware.parity import backend_on, compare
from pipelines.rendering import RenderRequest, VideoMember
from pipelines.stats import StatsRecorder
from pipelines.storage.headers import video_facts
from sharding.media.codecs import stored_codec


def tried(device: torch.device, codec: str, good: bytes, bad: bytes, spec: ClipSpec) -> dict[str, Any]:
    """Fields of a `DamageTrial`: how the device's backend takes `bad`."""
    oracle = ReferenceBackend(crop_size=spec.crop_size, stats=StatsRecorder())
    backend = backend_on(device, codec, spec, threads=1)
    wanted = _spread(video_facts(good, stored_codec(codec), where="the clip").num_frames, spec.num_frames)
    said = {"backend": backend.name, "psnr_db": None, "words": ""}
    try:
        ours = backend.render([_request(codec, bad, spec, wanted)])
    except CA2STError as error:
        return said | {"outcome": "refused", "words": str(error)}
    finally:
        backend.close()
    try:
        theirs, outcome = oracle.render([_request(codec, bad, spec, wanted)]), "decoded"
    except CA2STError as error:
        theirs, outcome = oracle.render([_request(codec, good, spec, wanted)]), "concealed"
        said["words"] = f"the reference: {error}"
    return said | {"outcome": outcome, "psnr_db": compare(codec, "decode", ours, theirs).psnr_db}


def _spread(num_frames: int, wanted: int) -> tuple[int, ...]:
    """Frames from the first to the last one."""
    return tuple(number * (num_frames - 1) // max(1, wanted - 1) for number in range(wanted))


def _request(codec: str, data: bytes, spec: ClipSpec, wanted: tuple[int, ...]) -> RenderRequest:
    side = spec.crop_size
    box = CropBox(top=0, left=0, height=side, width=side)
    frames = VideoMember(data, codec, wanted)
    return RenderRequest(frames=frames, boxes=(box,), flip=False, where="the damaged clip")


def main(arguments: list[str]) -> None:
    """Try one clip."""
    device, codec, good, bad, num_frames, crop_size = arguments
    spec = ClipSpec(num_frames=int(num_frames), crop_size=int(crop_size))
    found = tried(torch.device(device), codec, Path(good).read_bytes(), Path(bad).read_bytes(), spec)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
