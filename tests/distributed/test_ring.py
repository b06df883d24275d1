"""The ring's order of visits and the gradients' way home, on up to nine ranks.

Ranks are threads here, since so many processes would be slow. Messages go through queues, so that
those between two ranks arrive in order.
"""

import itertools
import queue
import threading
import weakref
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastclip.distributed.exchange import Ring
from fastclip.distributed.shard import Shard

WORLD_SIZES = range(1, 10)


class Mail:
    """Replaces torch.distributed in `Shard.swap`, between threads. A group is a rank's number."""

    isend, irecv = "isend", "irecv"

    def __init__(self) -> None:
        ranks = range(max(WORLD_SIZES))  # all made before threads start
        self.boxes = {(a, b): queue.Queue[Tensor]() for a in ranks for b in ranks}
        self.exchanges: dict[int, int] = defaultdict(int)
        self.tensors: dict[int, list[weakref.ref[Tensor]]] = defaultdict(list)
        self.most: dict[int, int] = defaultdict(int)  # that existed during an exchange

    def P2POp(self, op: str, tensor: Tensor, group: int, group_peer: int) -> Any:
        self.tensors[group].append(weakref.ref(tensor))
        return SimpleNamespace(op=op, tensor=tensor, rank=group, peer=group_peer)

    def batch_isend_irecv(self, operations: list[Any]) -> list[Any]:
        rank = operations[0].rank
        self.exchanges[rank] += 1
        self.most[rank] = max(self.most[rank], self.held(rank))
        for o in operations:
            if o.op == "isend":
                self.boxes[o.rank, o.peer].put(o.tensor.clone())
        return [SimpleNamespace(wait=lambda o=o: self._wait(o)) for o in operations]

    def held(self, rank: int) -> int:
        """The number of tensors that still exist, of all that a rank ever sent or received."""
        return len({id(x) for x in (ref() for ref in self.tensors[rank]) if x is not None})

    def _wait(self, operation: Any) -> None:
        if operation.op == "irecv":
            box = self.boxes[operation.peer, operation.rank]
            operation.tensor.copy_(box.get(timeout=10))  # also fails if shapes differ


def on_every_rank(world_size: int, sizes: tuple[int, ...], run: Any) -> list[Any]:
    starts = tuple(itertools.accumulate(sizes[:-1], initial=0))
    every = tuple(slice(0, size) for size in sizes)
    results: list[Any] = [None] * world_size
    failures: list[Exception] = []

    def one(rank: int) -> None:
        try:
            shard = Shard(rank, rank, sizes, starts, every, True, True)  # type: ignore[arg-type]
            results[rank] = run(Ring(shard))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    if failures:
        raise failures[0]
    return results


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_rank_visits_every_rank_once(
    world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mail = Mail()
    monkeypatch.setattr("fastclip.distributed.shard.dist", mail)
    sizes = tuple(2 + (3 * rank) % 4 for rank in range(world_size))
    batch = torch.arange(float(sum(sizes)))[:, None]

    def run(ring: Ring) -> list[int]:
        seen = []
        for visit in ring.start(batch[ring.shard.mine]):
            assert torch.equal(visit.features, batch[visit.columns])
            assert visit.has_own == (visit.columns == ring.shard.mine)
            seen += range(visit.columns.start, visit.columns.stop)
        return seen

    for rank, seen in enumerate(on_every_rank(world_size, sizes, run)):
        assert sorted(seen) == list(range(len(batch)))
        assert seen[: sizes[rank]] == list(range(*slice_of(sizes, rank)))  # its own come first
    # Each exchange brings two ranks' features.
    assert set(mail.exchanges.values()) <= {world_size // 2}


def slice_of(sizes: tuple[int, ...], rank: int) -> tuple[int, int]:
    return sum(sizes[:rank]), sum(sizes[: rank + 1])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_gradients_get_home(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank r adds 10^r to every gradient, so that each digit of a sum stands for one rank."""
    monkeypatch.setattr("fastclip.distributed.shard.dist", Mail())
    sizes = tuple(1 + rank % 3 for rank in range(world_size))

    def run(ring: Ring) -> Tensor:
        mine = torch.zeros(sizes[ring.shard.rank], 2, dtype=torch.float64)
        journey = ring.start(mine)
        for visit in journey:
            part = visit.features + 10.0**ring.shard.rank + visit.columns.start / 1e3
            journey.give_back(part)
        return journey.finish()

    for rank, gradient in enumerate(on_every_rank(world_size, sizes, run)):
        total = sum(10.0**r for r in range(world_size)) + world_size * sum(sizes[:rank]) / 1e3
        torch.testing.assert_close(gradient, torch.full((sizes[rank], 2), total).double())


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_rank_holds_few_tensors(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside its own, at most four ranks' features and five gradients."""
    mail = Mail()
    monkeypatch.setattr("fastclip.distributed.shard.dist", mail)
    sizes = (3,) * world_size

    def visiting(ring: Ring) -> int:
        rank = ring.shard.rank
        mine = torch.zeros(3, 2)
        return max(mail.held(rank) for _ in ring.start(mine)) - (world_size > 1)

    assert max(on_every_rank(world_size, sizes, visiting)) <= 4

    mail.tensors.clear()

    def homing(ring: Ring) -> int:
        most = []
        journey = ring.start(torch.zeros(3, 2))
        features = len(mail.tensors[ring.shard.rank])
        for _ in range(world_size):
            most.append(1 + mail.held(ring.shard.rank))  # plus the one that is being made
            journey.give_back(torch.zeros(3, 2))
        assert features == 0  # features are sent only if visits are asked for
        journey.finish()
        return max(most)

    assert max(on_every_rank(world_size, sizes, homing)) <= 5


def test_a_rank_holds_few_tensors_inside_an_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """While messages are made: beside its own, four ranks' features and the one that the last
    visitor still holds; four gradients."""
    mail = Mail()
    monkeypatch.setattr("fastclip.distributed.shard.dist", mail)

    def run(ring: Ring) -> tuple[int, int]:
        rank = ring.shard.rank
        for _ in ring.start(torch.zeros(3, 2)):
            pass
        visiting, mail.most[rank] = mail.most[rank], 0
        journey = ring.start(torch.zeros(3, 2))
        for _ in range(8):
            journey.give_back(torch.zeros(3, 2))
        journey.finish()
        return visiting, mail.most[rank]

    assert on_every_rank(8, (3,) * 8, run) == [(6, 4)] * 8
