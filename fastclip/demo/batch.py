"""The form of a batch and of a stream of batches, for any dataset: the loop and the losses need no
more than this."""

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor


class Batch(Protocol):
    """A batch of B pairs, of which a process makes b.

    `images` (b, 3, side, side) in [-1, 1] and `tokens` (b, T) are of the b pairs. `captions` and
    `samples` are of all B; a pair's sample is its number in the dataset.
    """

    @property
    def images(self) -> Tensor: ...

    @property
    def tokens(self) -> Tensor: ...

    @property
    def captions(self) -> tuple[str, ...]: ...

    @property
    def samples(self) -> tuple[int, ...]: ...


class Stream(Iterator[Batch], Protocol):
    """Endless batches that continue from a saved state."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...
