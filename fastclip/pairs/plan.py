"""The images, captions and crops of each training step, from the seed, the epoch and the pairs."""

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .images import chunks
from .pair import Pair


class Plan:
    """Each image is once in an epoch, with one of its captions. Images that are left over at the
    end of an epoch are dropped; they are different ones in each.

    Raises:
        ValueError: the batch size is below 2, or above the number of pairs: a batch holds no image
            twice.
    """

    def __init__(self, pairs: Sequence[Pair], batch_size: int, seed: int) -> None:
        if not 2 <= batch_size <= len(pairs):
            raise ValueError(
                f"batch size must be from 2 to {len(pairs)}, the number of images to train on, "
                f"got {batch_size}"
            )
        self._pairs, self._batch_size, self._seed = pairs, batch_size, seed
        self._per_epoch = len(pairs) // batch_size
        self._orders: dict[int, Tensor] = {}  # by epoch: the numbers of its images

    def numbers(self, step: int) -> list[int]:
        """Returns the numbers of a step's images."""
        epoch, place = divmod(step, self._per_epoch)
        if epoch not in self._orders:
            seed = random.Random(f"{self._seed} {epoch}").getrandbits(63)
            generator = torch.Generator().manual_seed(seed)
            # Two are kept, since images are decoded before their batch is due.
            kept = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders = {**kept, epoch: torch.randperm(len(self._pairs), generator=generator)}
        start = place * self._batch_size
        return self._orders[epoch][start : start + self._batch_size].tolist()

    def captions(self, step: int) -> tuple[str, ...]:
        """Returns the captions of a step's images."""
        return tuple(self._caption(number, step) for number in self.numbers(step))

    def _caption(self, number: int, step: int) -> str:
        captions = self._pairs[number].captions
        if len(captions) == 1:
            return captions[0]
        return random.Random(f"caption {self._key(number, step)}").choice(captions)

    def crops(self, step: int, rows: slice) -> Iterator[list[tuple[int, str]]]:
        """Yields, from a step on without an end, chunks of the numbers of the `rows` of batches,
        each with the key of its crop."""
        while True:
            own = self.numbers(step)[rows]
            for chunk in chunks(len(own)):
                yield [(own[place], self._key(own[place], step)) for place in chunk]
            step += 1

    def _key(self, number: int, step: int) -> str:
        return f"{self._seed} {step // self._per_epoch} {self._pairs[number].name}"
