"""How the other tower's features come to a rank's rows, and how their gradients get home.

`Gathered` holds all of them, O(B D): one visit, one reduce-scatter. `Ring` holds a few ranks' at a
time, O(b D): as many visits as ranks, the next ones under way while two are worked on; gradients
travel on behind, in fp32. Distances are between ranks, modulo their number.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import NamedTuple

import torch
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

    def own(self, held: Tensor) -> Tensor:
        return held[self.shard.mine]

    def visits(self, held: Tensor) -> Iterator[tuple[Tensor, slice]]:
        """Features and the columns that they are."""
        yield held, slice(0, self.shard.batch)

    def live(self, start: int, device: torch.device) -> tuple[slice | Tensor, int | None]:
        """Which of the columns visiting from `start` on are live, and from which place among these
        on this rank's own are; None: none are."""
        return self.shard.where_live(device), self.shard.of_live.start

    def home(self, parts: Iterator[Tensor]) -> Tensor:
        """Sums of the ranks' parts, one for each visit; this rank's own rows."""
        (part,) = parts
        return self.shard.scatter_sum(part)


class Ring:
    """Features travel both ways at once: at step s those of the ranks s after and s before visit,
    so that half as many steps as ranks are enough. Gradients follow them from rank to rank, and go
    straight home from the last one.

    Beside a rank's own at most four ranks' features and five gradients are here at a time.
    """

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.steps = shard.world_size // 2

    def held(self, y: Tensor) -> Tensor:
        return y.contiguous()

    def own(self, held: Tensor) -> Tensor:
        return held

    def visits(self, held: Tensor) -> Iterator[tuple[Tensor, slice]]:
        here = [held, held]  # one for each way
        for step in range(self.steps + 1):
            leaving = zip(here, self._owners(step + 1), strict=False)
            arriving = _Exchange(
                self.shard, [_Message(x, -_way(owner), _way(owner), owner) for x, owner in leaving]
            )
            for x, owner in zip(here, self._owners(step), strict=False):
                yield x, self.shard.rows_of(self.shard.at(owner))
            here = arriving.wait()

    def live(self, start: int, device: torch.device) -> tuple[slice | Tensor, int | None]:
        owner = bisect.bisect_right(self.shard.starts, start) - 1
        return self.shard.live[owner], 0 if owner == self.shard.rank else None

    def home(self, parts: Iterator[Tensor]) -> Tensor:
        own = next(parts)
        last: _Exchange | None = None
        arrivals = []
        for step in range(1, self.steps + 1):
            following = self._owners(step + 1)
            messages = []
            for k, owner in enumerate(self._owners(step)):
                total = next(parts)
                if last is not None:  # the sum of ranks that these features visited before
                    total.add_(last.wait()[k])
                if k < len(following):
                    messages.append(_Message(total, -_way(owner), _way(owner), following[k]))
                else:
                    messages.append(_Message(total, owner, -owner, 0))
            last = _Exchange(self.shard, messages)
            arrivals += [(last, k) for k in range(len(following), len(messages))]
        for exchange, k in arrivals:
            own.add_(exchange.wait()[k])
        return own

    def _owners(self, step: int) -> list[int]:
        """Whose features visit at a step, as distances from this rank."""
        if step == 0:
            return [0]
        # Halfway round both ways end at the same rank.
        return [d for d in (step, -step) if -self.shard.world_size < 2 * d <= self.shard.world_size]


def _way(owner: int) -> int:
    return 1 if owner > 0 else -1


class _Message(NamedTuple):
    """A tensor for the rank at distance `to`; from the one at `source` comes one of as many rows as
    the one at `owner` has."""

    outgoing: Tensor
    to: int
    source: int
    owner: int


class _Exchange:
    """Messages under way; those between the same two ranks arrive in their order."""

    def __init__(self, shard: Shard, messages: list[_Message]) -> None:
        # All tensors stay alive until the exchange is over.
        self.messages, self.incoming, self.works = messages, [], []
        operations = []
        for x, to, source, owner in messages:
            rows = shard.sizes[shard.at(owner)]
            self.incoming.append(x.new_empty((rows, *x.shape[1:])))
            operations += [
                dist.P2POp(dist.isend, x, group=shard.group, group_peer=shard.at(to)),
                dist.P2POp(
                    dist.irecv, self.incoming[-1], group=shard.group, group_peer=shard.at(source)
                ),
            ]
        if operations:
            self.works = dist.batch_isend_irecv(operations)

    def wait(self) -> list[Tensor]:
        """What came, in the order of the messages."""
        for work in self.works:
            work.wait()
        self.works, self.messages = [], []
        return self.incoming
