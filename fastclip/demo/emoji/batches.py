"""Training batches: one drawing and one caption for each of many different concepts.

No batch holds a false negative. Both vendors' drawings of a concept share its captions, so that a
batch holds a concept at most once, in one vendor's drawing. Concepts that look alike or have the
same name form a look-alike group, and a batch holds at most one concept of a group. Concepts of
different groups share no caption. An epoch visits every trained group once, in a new order. The
member of the group, the vendor, the caption and the background are drawn anew each time. Batches
depend on the seed alone.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...clip.zero_shot import TEMPLATES
from . import SIZE, VENDORS, Emoji
from .split import Split

# The fraction of captions that are a bare name for certain. The others are in one of TEMPLATES, of
# which one in four is the bare name, too.
PLAIN = 0.8
SHIFT = 2.0  # pixels at most, in each direction
ZOOM = 0.15  # the part of a drawing that is seen has 1 - ZOOM to 1 + ZOOM times its side
TINT = 0.2  # the strength with which colours are mixed and brightened


@dataclass(frozen=True)
class Batch:
    """A batch of B pairs, of which a process makes b.

    `images` (b, 3, SIZE, SIZE) in [-1, 1] and `tokens` (b, T) are of the b pairs; `concepts`,
    `vendors` and `captions` of all B.
    """

    images: Tensor
    tokens: Tensor
    concepts: tuple[int, ...]
    vendors: tuple[int, ...]
    captions: tuple[str, ...]

    @property
    def samples(self) -> tuple[int, ...]:
        """Each drawing of each concept is a sample of its own."""
        pairs = zip(self.concepts, self.vendors, strict=True)
        return tuple(len(VENDORS) * concept + vendor for concept, vendor in pairs)


class Batches:
    """Endless batches of the split's trained side.

    Args:
        encode: converts captions to token ids.
        rows: the pairs of each batch that become pictures and tokens, for a process that trains on
            these alone. The random choices are the same for any `rows`.

    Raises:
        ValueError: the batch size is below 2, or above the number of trained groups: a batch holds
            no group twice.
    """

    def __init__(
        self,
        emoji: Emoji,
        split: Split,
        encode: Callable[[list[str]], Tensor],
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        rows: slice = slice(None),
    ) -> None:
        self._groups = list(split.vendors)
        if not 2 <= batch_size <= len(self._groups):
            raise ValueError(f"batch size must be from 2 to {len(self._groups)}, got {batch_size}")
        self._emoji, self._split, self._encode = emoji, split, encode
        self._batch_size, self._rows = batch_size, rows
        # Two generators: the choice of captions must not depend on how many numbers the
        # augmentation draws.
        self._choose, self._noise = random.Random(seed), torch.Generator().manual_seed(seed)
        self._drawings = emoji.drawings.to(device)
        self._next = len(self._groups)  # the first epoch has yet to be shuffled

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        # Groups left over at the end of an epoch are dropped; the shuffle makes them different ones
        # in each epoch.
        if self._next + self._batch_size > len(self._groups):
            self._choose.shuffle(self._groups)
            self._next = 0
        chosen = self._groups[self._next : self._next + self._batch_size]
        self._next += self._batch_size
        choose, split = self._choose, self._split
        concepts = tuple(choose.choice(split.members[group]) for group in chosen)
        vendors = tuple(choose.choice(split.vendors[group]) for group in chosen)
        captions = tuple(
            _template(choose).format(_caption(self._emoji, concept, choose)) for concept in concepts
        )
        drawings = self._drawings[list(concepts), list(vendors)]
        images = augment(drawings, self._noise, self._rows)
        tokens = self._encode(list(captions[self._rows])).to(images.device)
        return Batch(images, tokens, concepts, vendors, captions)

    def state_dict(self) -> dict[str, Any]:
        """Returns the position in the stream, which does not depend on `rows`."""
        return {
            "groups": list(self._groups),
            "next": self._next,
            "choose": self._choose.getstate(),
            "noise": self._noise.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next batch the one that followed when `state` was taken."""
        self._groups, self._next = list(state["groups"]), state["next"]
        self._choose.setstate(state["choose"])
        self._noise.set_state(state["noise"])


def _template(choose: random.Random) -> str:
    return "{}" if choose.random() < PLAIN else choose.choice(TEMPLATES)


def _caption(emoji: Emoji, concept: int, choose: random.Random) -> str:
    name, *others = emoji.concepts[concept].captions
    return choose.choice(others) if others and choose.random() < 0.4 else name


def augment(drawings: Tensor, noise: torch.Generator, rows: slice = slice(None)) -> Tensor:
    """Shifts, zooms and tints drawings and puts them on backgrounds of random colours.

    `drawings` are (B, 4, SIZE, SIZE) uint8. `noise` is a CPU generator, so that the random numbers
    are the same on any device. They are drawn for all drawings, although only `rows` are returned,
    so that they are the same for any slice.
    """
    whole, device = len(drawings), drawings.device

    def uniform(*shape: int) -> Tensor:  # in [-1, 1)
        return (2 * torch.rand(whole, *shape, generator=noise) - 1)[rows].to(device)

    colour, opacity = premultiply(drawings[rows])
    count = len(colour)
    tint = torch.eye(3, device=device) * (1 + TINT * uniform(1, 1)) + TINT / 2 * uniform(3, 3)
    colour = (tint @ colour.flatten(2)).unflatten(2, (SIZE, SIZE))
    corner = torch.eye(2, device=device) * (1 + ZOOM * uniform(1, 1))
    place = torch.cat([corner, uniform(2, 1) * (2 * SHIFT / SIZE)], dim=2)  # (B, 2, 3)
    grid = F.affine_grid(place, [count, 4, SIZE, SIZE], align_corners=False)
    moved = F.grid_sample(torch.cat([colour, opacity], dim=1), grid, align_corners=False)
    background = (uniform(3, 1, 1) + 1) / 2
    return 2 * (moved[:, :3] + (1 - moved[:, 3:]) * background).clamp(0, 1) - 1


def on_white(drawings: Tensor) -> Tensor:
    """Returns drawings (B, 4, SIZE, SIZE) uint8 on white, unmoved, as the evaluation uses them."""
    colour, opacity = premultiply(drawings)
    return 2 * (colour + (1 - opacity)) - 1


def premultiply(drawings: Tensor) -> tuple[Tensor, Tensor]:
    """Returns colours times opacity (B, 3, ...) and opacity (B, 1, ...), both in [0, 1]."""
    rgba = drawings.float() / 255
    return rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]
