"""One batch out of shard sets of several codecs: every clip goes to the backend of its codec, and back to its place."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import UInt8
from torch import Tensor

from pipelines.rendering import JpegFrames, RenderRequest, ViewBackend


class RoutedBackend:
    """Renders clips by the backends of their codecs."""

    def __init__(self, backends: Mapping[str, ViewBackend]) -> None:
        """`backends` by codec."""
        self._backends = dict(backends)
        self.name = ", ".join(f"{codec}: {backend.name}" for codec, backend in self._backends.items())

    def render(self, requests: Sequence[RenderRequest]) -> UInt8[Tensor, "views 3 time height width"]:
        """See `ViewBackend.render`."""
        views: dict[int, Tensor] = {}
        for codec, backend in self._backends.items():
            places = [place for place, request in enumerate(requests) if codec_of(request) == codec]
            if places:
                own = [requests[place] for place in places]
                parts = torch.split(backend.render(own), [len(request.boxes) for request in own])
                views |= dict(zip(places, parts, strict=True))
        # Codecs that the device does not decode come from the CPU.
        device = next((part.device for part in views.values() if part.device.type != "cpu"), torch.device("cpu"))
        return torch.cat([views[place].to(device) for place in range(len(requests))])

    def close(self) -> None:
        """Close every backend."""
        for backend in self._backends.values():
            backend.close()


def codec_of(request: RenderRequest) -> str:
    """The codec that the clip of a request is stored in."""
    return "mjpeg" if isinstance(request.frames, JpegFrames) else request.frames.codec
