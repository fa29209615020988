"""Binding: several objects, each with a rhythm of its own; the label is the object whose rhythm is heard.

How a sample comes about, with M objects (one of each of the first M shapes, so every clip shows the same shapes):

1. the label y is drawn, evenly over the M objects;
2. independently of it, M different rhythms r_1 .. r_M are drawn in random order, one for each object, and so is
   everything else in the picture: places, colours, clutter;
3. the sound plays the rhythm a = r_y; pitch, loudness and noise are drawn independently.

What this means for what can be known:

- **From the picture alone: nothing.** y is independent of all that step 2 draws, which is the whole picture. Ceiling
  1 / M.
- **From the sound alone: nothing.** r_y is uniform over all rhythms whatever y is, as every r_i is; the rest of the
  sound is independent. Ceiling 1 / M.
- **From what each sense says of the label, however combined: nothing.** P(y | picture) and P(y | sound) are both
  uniform in every clip, so any product, mean or vote of them is. A unimodal classifier has nothing to learn. Only the
  pair (picture, sound) decides: y is the one i with r_i = a.
- **From frames without their order: nothing.** Every rhythm has two beats in four quarters, so each object's and the
  sound's averages over time are the same in every clip. Such frames do show which objects beat together, but every
  order of the quarters is equally likely (places and clutter are drawn anew in each), and over all orders each
  object's rhythm is each of the six equally often, so beside the sound too they leave y uniform.
- **A sum of scores, u_i(picture) + w_i(sound), trained jointly** is not at chance, but cannot be right: where two
  objects swap their rhythms, the order of the w_i must swap too, and w does not see the picture. With two objects at
  most 3 of 4 clips are right; with three and four a search over w found no more than 67 % and 60 %.
- **A network on top of both pooled features** is bounded only by what they hold: it has to keep every object's rhythm
  in one vector and to learn the pairs one by one.

Asking both senses at the same moment (is there a beat in the sound now? which objects beat now?) solves it.
"""

import functools
from dataclasses import dataclass

from sharding.synthetic.config import SyntheticConfig
from sharding.synthetic.factors import BINDING, generator
from sharding.synthetic.outlines import SHAPES
from sharding.synthetic.rhythms import RHYTHMS


@dataclass(frozen=True, slots=True)
class Binding:
    """Who beats when in one clip, and whom the sound follows."""

    keeper: int
    """The label: index of the object (and of its shape) that keeps time with the sound."""
    rhythms: tuple[int, ...]
    """Rhythm of each object, all different, as indices into RHYTHMS."""
    tone: int
    """Pitch class of the sound; tells nothing."""

    @property
    def heard(self) -> int:
        """Rhythm of the sound."""
        return self.rhythms[self.keeper]


def binding_of(config: SyntheticConfig, split: str, index: int) -> Binding:
    """The objects' rhythms and the keeper of sample `index`; any first N samples hold the keepers evenly."""
    num_objects = config.settings.num_objects
    block, position = divmod(index, num_objects)
    random = generator(config.seed, split, BINDING, index).spawn(1)[0]
    return Binding(
        keeper=_keepers(num_objects, config.seed, split, block)[position],
        rhythms=tuple(int(rhythm) for rhythm in random.permutation(len(RHYTHMS))[:num_objects]),
        tone=int(random.integers(config.num_tones)),
    )


def object_shapes(config: SyntheticConfig) -> tuple[str, ...]:
    """The shapes of every clip, which are the classes."""
    return SHAPES[: config.settings.num_objects]


@functools.lru_cache(maxsize=64)
def _keepers(num_objects: int, seed: int, split: str, block: int) -> tuple[int, ...]:
    """Every object once, in random order."""
    return tuple(int(keeper) for keeper in generator(seed, split, BINDING, block).permutation(num_objects))
