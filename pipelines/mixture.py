"""Which source each slot of an epoch reads: exact shares in every block of slots, in a keyed order.

The slots of an epoch are one line. It is cut into blocks; each holds the same number of slots of a source, its quota,
in a random order keyed by the block::

    quotas 2 : 1 (a real block is 64 slots or more)     | b a a | a a b | a b a | ...
    reading number of a source:        a:  0 1    2 3      4 5        b: 0     1     2

Hence the reading number of any slot, and how many slots of a source lie before it, follow from the block alone.
Readings 0 .. length-1 of a source are its first pass, the next as many its second.
"""

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from pipelines.keyed_random import Key, permutation


class MixtureOrder:
    """Sources by slot. Not for several threads at once: it keeps the blocks in use."""

    def __init__(self, quotas: NDArray[np.int64], *, key: Key, most_blocks: int) -> None:
        """`quotas`: slots of each source in one block; `most_blocks`: blocks kept, each a few kilobytes."""
        self._quotas, self._key, self._most_blocks = quotas, key, most_blocks
        self._block_size = int(quotas.sum())
        self._blocks: OrderedDict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = OrderedDict()

    @property
    def num_sources(self) -> int:
        """Sources that are mixed."""
        return len(self._quotas)

    def at(self, slots: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each slot, and the how-many-th reading of that source it is."""
        if self.num_sources == 1:
            return np.zeros_like(slots), slots
        sources, readings = np.empty_like(slots), np.empty_like(slots)
        blocks, inside = np.divmod(slots, self._block_size)
        for block in np.unique(blocks):
            here = blocks == block
            order, numbers = self._block(int(block))
            sources[here] = order[inside[here]]
            readings[here] = block * self._quotas[sources[here]] + numbers[inside[here]]
        return sources, readings

    def readings_before(self, slot: int) -> NDArray[np.int64]:
        """How many slots of each source lie before `slot`."""
        if self.num_sources == 1:
            return np.array([slot])
        block, inside = divmod(slot, self._block_size)
        partial = np.bincount(self._block(block)[0][:inside], minlength=self.num_sources)
        return block * self._quotas + partial

    def _block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source of every slot of a block, and its number among the block's slots of that source."""
        if block not in self._blocks:
            stored = np.repeat(np.arange(self.num_sources), self._quotas)
            order = stored[permutation((*self._key, block), self._block_size)]
            numbers = np.empty_like(order)
            for source in range(self.num_sources):
                numbers[order == source] = np.arange(self._quotas[source])
            self._blocks[block] = (order, numbers)
        self._blocks.move_to_end(block)
        while len(self._blocks) > self._most_blocks:
            self._blocks.popitem(last=False)
        return self._blocks[block]
