"""How the other tower's features come to a rank's rows, and how their gradients get home.

`Gathered` holds all of them, O(B D): one visit, one reduce-scatter. `Ring` holds two ranks' at a
time, O(b D): as many visits as ranks, the next one under way while one is worked on; gradients
travel on behind, in fp32, a hop after each visit. Neighbours exchange with neighbours only.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.distributed as dist
from torch import Tensor

from .shard import Shard


class Gathered:
    """All features at once."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard

    def held(self, y: Tensor) -> Tensor:
        """What a rank keeps of y (b, ...) between forward and backward."""
        return self.shard.gather(y)

    def visits(self, held: Tensor) -> Iterator[tuple[Tensor, slice]]:
        """Features and the columns that they are."""
        yield held, slice(0, self.shard.batch)

    def home(self, parts: Iterator[Tensor]) -> Tensor:
        """Sums of the ranks' parts, one for each visit; this rank's own rows."""
        (part,) = parts
        return self.shard.scatter_sum(part)


class Ring:
    """Rank r receives from r + 1 and sends to r - 1: at step s the features of r + s visit."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard

    def held(self, y: Tensor) -> Tensor:
        return y.contiguous()

    def visits(self, held: Tensor) -> Iterator[tuple[Tensor, slice]]:
        shard, here = self.shard, held
        for step in range(shard.world_size):
            following = None
            if step + 1 < shard.world_size:
                following = self._hop(here, self._owner(step + 1))
            yield here, shard.rows_of(self._owner(step))
            if following is not None:
                here = following.wait()

    def home(self, parts: Iterator[Tensor]) -> Tensor:
        arriving = None
        for step, part in enumerate(parts):
            # What arrives was summed by the ranks that these features visited before.
            total = part if arriving is None else part.add_(arriving.wait())
            arriving = self._hop(total, self._owner(step + 1))
        return arriving.wait()

    def _owner(self, step: int) -> int:
        return (self.shard.rank + step) % self.shard.world_size

    def _hop(self, x: Tensor, arriving: int) -> _Hop:
        rows = self.shard.sizes[arriving]
        return _Hop(self.shard, x, x.new_empty((rows, *x.shape[1:])))


class _Hop:
    """One exchange with both neighbours, under way."""

    def __init__(self, shard: Shard, outgoing: Tensor, incoming: Tensor) -> None:
        # Both tensors stay alive until the exchange is over.
        self.outgoing, self.incoming = outgoing, incoming
        self.works = []
        if shard.world_size == 1:
            self.incoming = outgoing
            return
        before, after = (shard.rank - 1) % shard.world_size, (shard.rank + 1) % shard.world_size
        operations = [
            dist.P2POp(dist.isend, outgoing, group=shard.group, group_peer=before),
            dist.P2POp(dist.irecv, incoming, group=shard.group, group_peer=after),
        ]
        self.works = dist.batch_isend_irecv(operations)

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.incoming
