"""The ring's messages travel while ranks compute: posted before a visit, waited for afterwards.

One rank runs alone here: its messages are counted, and nothing arrives.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastclip.distributed.exchange import Ring
from fastclip.distributed.shard import Shard

WORLD_SIZES = range(2, 10)


class Post:
    """Replaces torch.distributed in `Shard.swap`, and counts messages."""

    isend, irecv = "isend", "irecv"

    def __init__(self) -> None:
        self.under_way = 0
        self.posted = 0

    def P2POp(self, op: str, tensor: Tensor, group: object, group_peer: int) -> str:
        if op == "irecv":
            tensor.zero_()
        return op

    def batch_isend_irecv(self, operations: list[str]) -> list[Any]:
        self.under_way += len(operations)
        self.posted += len(operations)
        return [SimpleNamespace(wait=self._arrived) for _ in operations]

    def _arrived(self) -> None:
        self.under_way -= 1


@pytest.fixture
def post(monkeypatch: pytest.MonkeyPatch) -> Post:
    post = Post()
    monkeypatch.setattr("fastclip.distributed.shard.dist", post)
    return post


def ring_of(world_size: int) -> Ring:
    sizes = (2,) * world_size
    starts = tuple(range(0, 2 * world_size, 2))
    every = (slice(0, 2),) * world_size
    return Ring(Shard(None, 1, sizes, starts, every, True, True))


def steps_of(world_size: int) -> list[int]:
    """The step of each visit: own features, then both neighbours', and so on."""
    return [(visit + 1) // 2 for visit in range(world_size)]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_next_features_travel_during_a_visit(post: Post, world_size: int) -> None:
    """Throughout a step's visits, except those of the last step: nothing follows them."""
    journey = ring_of(world_size).start(torch.zeros(2, 3))
    seen = [(post.under_way, post.posted) for _ in journey]
    steps = steps_of(world_size)
    assert len(seen) == world_size and post.under_way == 0
    for (under_way, posted), step in zip(seen, steps, strict=True):
        # Each exchange so far sent features and received some.
        ahead = min(step + 1, steps[-1])
        assert posted == 2 * sum(1 <= s <= ahead for s in steps)
        assert (under_way > 0) == (step < steps[-1])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_gradients_travel_while_the_next_are_made(post: Post, world_size: int) -> None:
    steps, under_way = steps_of(world_size), []
    journey = ring_of(world_size).start(torch.zeros(2, 3))
    for _ in steps:
        under_way.append(post.under_way)
        journey.give_back(torch.zeros(2, 3))
    journey.finish()
    assert post.under_way == 0 and post.posted == 2 * (world_size - 1)
    for visit, step in enumerate(steps):
        if step > 1 and step != steps[visit - 1]:  # the first visit of a step
            assert under_way[visit] > 0


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_features_and_gradients_travel_at_once(post: Post, world_size: int) -> None:
    """While a step's first block is weighed, the next step's features and the previous step's
    gradients travel."""
    steps, under_way = steps_of(world_size), []
    journey = ring_of(world_size).start(torch.zeros(2, 3))
    for visit in journey:
        under_way.append(post.under_way)
        journey.give_back(torch.zeros_like(visit.features))
    journey.finish()
    assert post.under_way == 0 and post.posted == 4 * (world_size - 1)
    for visit, step in enumerate(steps):
        if visit == 0 or step != steps[visit - 1]:
            to_come = steps.count(step + 1)
            gone = steps.count(step - 1) if step > 1 else 0
            assert under_way[visit] == 2 * (to_come + gone)
