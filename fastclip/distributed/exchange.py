"""The exchange of column features and of their gradients: gathered, or around a ring.

`Gathered` holds all features, O(B D), and reduce-scatters their gradients. `Ring` holds a few
ranks' features at a time, O(b D): there are as many visits as ranks, the next two ranks' features
travel while two are worked on, and gradients follow in fp32. Distances are between ranks, modulo
their number.

Both send features on a journey. One loop takes visits from it and gives their gradients back:

    journey = columns.start(held)
    for visit in journey:
        journey.give_back(gradient of visit.features)
    own = journey.finish()
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .shard import Parcel, Shard


class Visit(NamedTuple):
    """The features of some columns."""

    features: Tensor
    columns: slice
    has_own: bool  # this rank's own are among them


class Gathered:
    """An exchange that holds all features at once.

    apart: a rank's own features visit first, then those before and after them, each as a block.
    """

    def __init__(self, shard: Shard, apart: bool = False) -> None:
        self.shard = shard
        self.apart = apart

    @property
    def visits(self) -> int:
        return 3 if self.apart else 1

    def held(self, y: Tensor) -> Tensor:
        """Returns the features that a rank with y (b, ...) keeps between forward and backward."""
        return self.shard.gather(y)

    def own(self, held: Tensor) -> Tensor:
        return held[self.shard.mine]

    def live(self, visit: Visit) -> tuple[slice | Tensor, int | None]:
        """Returns the places of the live columns among the visit's columns; and the number of the
        first live column of this rank among these, or None if the visit has none of this rank."""
        return self.shard.where_live(visit.features.device), self.shard.of_live.start

    def start(self, held: Tensor, home: Shard | None = None) -> _GatheredJourney:
        """Starts a journey. home: the shard of the gradients, if only live columns have any."""
        return _GatheredJourney(self, held, home or self.shard)


class _GatheredJourney:
    """The journey of gathered features."""

    def __init__(self, gathered: Gathered, held: Tensor, home: Shard) -> None:
        self.gathered, self.held, self.home = gathered, held, home
        self.gradients: list[Tensor] = []

    def __iter__(self) -> Iterator[Visit]:
        shard = self.gathered.shard
        if not self.gathered.apart:
            yield Visit(self.held, slice(0, shard.batch), True)
            return
        own = shard.mine
        for columns in (own, slice(0, own.start), slice(own.stop, shard.batch)):
            yield Visit(self.held[columns], columns, columns is own)

    def give_back(self, gradient: Tensor) -> None:
        """Takes the gradient of the visit's features."""
        self.gradients.append(gradient)

    def finish(self) -> Tensor:
        """Returns the sum over ranks for this rank's own rows."""
        own, *others = self.gradients
        self.gradients = []
        if others:
            before, behind = others
            own = torch.cat((before, own, behind))
            del others, before, behind
        return self.home.scatter_sum(own)


class Ring:
    """An exchange around a ring, both ways at once.

    At step s this rank is visited by the features of two ranks, at distances s and -s, so that half
    as many steps as ranks are enough. Gradients follow the features from rank to rank, and the last
    rank that was visited sends them directly to the features' own rank. Beside its own, a rank
    holds at most four ranks' features and five gradients.
    """

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.steps = shard.world_size // 2
        self.visits = shard.world_size

    def held(self, y: Tensor) -> Tensor:
        return y.contiguous()

    def own(self, held: Tensor) -> Tensor:
        return held

    def live(self, visit: Visit) -> tuple[slice | Tensor, int | None]:
        columns = [self.shard.rows_of(rank) for rank in range(self.shard.world_size)]
        owner = columns.index(visit.columns)
        return self.shard.live[owner], 0 if visit.has_own else None

    def start(self, held: Tensor, home: Shard | None = None) -> _RingJourney:
        return _RingJourney(self, held, home or self.shard)

    def owners(self, step: int) -> list[int]:
        """The ranks whose features visit at a step, as distances from this one."""
        if step == 0:
            return [0]
        # Halfway round, both ways meet at the same rank.
        return [d for d in (step, -step) if -self.shard.world_size < 2 * d <= self.shard.world_size]


class _RingJourney:
    """The journey round the ring."""

    def __init__(self, ring: Ring, held: Tensor, home: Shard) -> None:
        self.ring, self.held, self.home = ring, held, home
        self.step = 0  # the step of the gradients
        self.own: list[Tensor] = []
        self.leaving: list[_Message] = []  # this step's gradients
        self.last: _Exchange | None = None
        self.arrivals: list[tuple[_Exchange, int]] = []

    def __iter__(self) -> Iterator[Visit]:
        ring, shard = self.ring, self.ring.shard
        here = [self.held, self.held]  # one for each way
        for step in range(ring.steps + 1):
            leaving = zip(here, ring.owners(step + 1), strict=False)
            arriving = _Exchange(
                shard, [_Message(x, -_way(owner), _way(owner), owner) for x, owner in leaving]
            )
            for x, owner in zip(here, ring.owners(step), strict=False):
                yield Visit(x, shard.rows_of(shard.at(owner)), owner == 0)
            here = arriving.wait()

    def give_back(self, gradient: Tensor) -> None:
        """Sends a step's gradients on after its last visit; they travel during the next visits."""
        if self.step == 0:
            self.own.append(gradient)
            self.step = 1
            return
        owners, following = self.ring.owners(self.step), self.ring.owners(self.step + 1)
        k = len(self.leaving)
        if self.last is not None:  # the sum over the ranks that these features visited before
            gradient.add_(self.last.wait()[k])
        owner = owners[k]
        if k < len(following):
            self.leaving.append(_Message(gradient, -_way(owner), _way(owner), following[k]))
        else:
            self.leaving.append(_Message(gradient, owner, -owner, 0))
        if len(self.leaving) == len(owners):
            self.last = None  # its gradients were added: they are freed before more arrive
            self.last = _Exchange(self.home, self.leaving)
            self.arrivals += [(self.last, k) for k in range(len(following), len(owners))]
            self.leaving, self.step = [], self.step + 1

    def finish(self) -> Tensor:
        own = self.own.pop()
        for exchange, k in self.arrivals:
            own.add_(exchange.wait()[k])
        self.last, self.arrivals = None, []
        return own


def _way(owner: int) -> int:
    return 1 if owner > 0 else -1


class _Message(NamedTuple):
    """A tensor sent to the rank at distance `to`, and one expected from the rank at distance
    `source`, with as many rows as the rank at distance `owner` has."""

    outgoing: Tensor
    to: int
    source: int
    owner: int


class _Exchange:
    """Messages under way. Those between the same two ranks arrive in order. Messages without rows,
    of ranks without columns, are not sent."""

    def __init__(self, shard: Shard, messages: list[_Message]) -> None:
        # Keeps all tensors alive until the exchange is over.
        self.messages, self.incoming = messages, []
        parcels = []
        for x, to, source, owner in messages:
            rows = shard.sizes[shard.at(owner)]
            incoming = x.new_empty((rows, *x.shape[1:]))
            self.incoming.append(incoming)
            if x.shape[0]:
                parcels.append(Parcel(x, to, arrives=False))
            if rows:
                parcels.append(Parcel(incoming, source, arrives=True))
        self.works = shard.swap(parcels)

    def wait(self) -> list[Tensor]:
        """Returns the received tensors in the order of the messages."""
        for work in self.works:
            work.wait()
        self.works, self.messages = [], []
        return self.incoming
