"""RandAugment and erasing of rendered views: the last stage of every backend but the reference, on threads of its own.

Decoding, cropping and resizing are a graph's business; these operations are cheaper outside of it. On the CPU a clip
costs a few milliseconds here (fused.py) where DALI's warps alone cost 20 to 30; on a GPU the formulas of pointwise.py
run on the device. Either gives the same bytes as the reference backend does from the same view.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

from jaxtyping import UInt8
from torch import Tensor

from pipelines.augment.erase import erase_in_place
from pipelines.augment.fused import augment_in_place
from pipelines.augment.pointwise import augmented
from pipelines.rendering import RenderRequest


class Finisher:
    """Finishes views in place, several at once."""

    def __init__(
        self, *, threads: int, inside: Callable[[], AbstractContextManager[object]] = lambda: nullcontext()
    ) -> None:
        """`inside` is entered around each view on the thread that finishes it: the device's stream."""
        self._inside = inside
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="clip-augment")

    def finish(self, views: UInt8[Tensor, "views 3 time size size"], requests: Sequence[RenderRequest]) -> None:
        """Augment and erase `views`, which must be contiguous: those of the requests in order, equally many each."""
        self.begin(views, requests)()

    def begin(
        self, views: UInt8[Tensor, "views 3 time size size"], requests: Sequence[RenderRequest]
    ) -> Callable[[], None]:
        """Start what `finish` does; the call that is returned waits until it is done."""
        views_per_clip = len(views) // len(requests)
        wanted = [
            (views[clip * views_per_clip + view], request)
            for clip, request in enumerate(requests)
            for view in range(views_per_clip)
            if request.augment is not None or request.erased
        ]
        futures = [self._pool.submit(self._finish_one, view, request) for view, request in wanted]

        def wait() -> None:
            for future in futures:
                future.result()

        return wait

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _finish_one(self, view: UInt8[Tensor, "3 time size size"], request: RenderRequest) -> None:
        with self._inside():
            finish_view(view, request)


def finish_view(view: UInt8[Tensor, "3 time size size"], request: RenderRequest) -> None:
    """Augment and erase one contiguous view in place."""
    if request.augment is not None:
        if view.device.type == "cpu":
            augment_in_place(view.numpy(), request.augment)
        else:
            view.copy_(augmented(view, request.augment))
    erase_in_place(view, request.erased)
