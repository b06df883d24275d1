"""Training batches of one's own pairs.

They depend on the seed, the epoch and the pairs alone, so that the position in the stream is a
number of steps, and any number of processes decodes the same images.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .images import CHUNK, Augmentation, Images, as_input, chunks, in_processes
from .pair import Pair
from .plan import Plan


@dataclass(frozen=True)
class Batch:
    """A batch of B pairs, of which a process makes b.

    `images` (b, 3, side, side) in [-1, 1] and `tokens` (b, T) are of the b pairs; `captions`, and
    `samples`, the numbers of the images, of all B.
    """

    images: Tensor
    tokens: Tensor
    captions: tuple[str, ...]
    samples: tuple[int, ...]


class Batches:
    """Endless batches of pairs, as `Plan` has them.

    Args:
        encode: converts captions to token ids on the device.
        rows: the pairs of each batch that become pictures and tokens, for a process that trains on
            these alone. The random choices are the same for any `rows`.
        processes: the worker processes that decode images; 0 decodes them in this process.

    Raises:
        ValueError: as `Plan`.
    """

    def __init__(
        self, pairs: Sequence[Pair], encode: Callable[[Sequence[str]], Tensor], batch_size: int,
        seed: int, side: int, augmentation: Augmentation, *, device: torch.device | str = "cpu",
        rows: slice = slice(None), processes: int = 0,
    ) -> None:  # fmt: skip
        self._plan, self._encode = Plan(pairs, batch_size, seed), encode
        self._device, self._rows, self._processes = torch.device(device), rows, processes
        self._images = Images([pair.place for pair in pairs], side, augmentation)
        self._count = len(range(batch_size)[rows])
        self._step = 0
        # It must hold no reference to this object: the garbage collector, which frees cycles,
        # takes the processes' queues away before they end, and their end is then waited for.
        self._decoded: Iterator[Tensor] | None = None

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        if self._decoded is None:
            a_step = -(-self._count // CHUNK)
            # The processes together are a step ahead, and a chunk each.
            ahead = 1 + -(-a_step // max(1, self._processes))
            crops = self._plan.crops(self._step, self._rows)
            self._decoded = in_processes(self._images, crops, self._processes, ahead)
        captions = self._plan.captions(self._step)
        numbers = tuple(self._plan.numbers(self._step))
        self._step += 1
        pixels = torch.cat([next(self._decoded) for _ in chunks(self._count)])
        images = as_input(pixels.to(self._device))
        return Batch(images, self._encode(captions[self._rows]), captions, numbers)

    def state_dict(self) -> dict[str, Any]:
        """Returns the position in the stream, which does not depend on `rows`."""
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next batch the one that followed when `state` was taken."""
        self._step, self._decoded = state["step"], None
