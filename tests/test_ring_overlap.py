"""The ring's messages travel while blocks are worked on: posted before, waited for afterwards.

A rank on its own here: what it posts and waits for is noted, and nothing arrives.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastclip import block_row, visits
from fastclip.shard import Shard
from fastclip.visits import Ring

WORLD_SIZES = range(2, 10)


class Post:
    """What `visits.py` uses of torch.distributed."""

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
    monkeypatch.setattr(visits, "dist", post)
    return post


def ring_of(world_size: int) -> Ring:
    sizes = (2,) * world_size
    starts = tuple(range(0, 2 * world_size, 2))
    every = (slice(0, 2),) * world_size
    return Ring(Shard(None, 1, sizes, starts, every, True, True))


def steps_of(world_size: int) -> list[int]:
    """The step of each visit: own features, then both neighbours', and so on."""
    return [(visit + 1) // 2 for visit in range(world_size)]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_next_features_travel_during_a_visit(
    post: Post, world_size: int, normalize: bool
) -> None:
    """All along a step's visits; during the last step's nothing is to come."""
    context = SimpleNamespace(columns=ring_of(world_size))
    operands = SimpleNamespace(
        held=torch.zeros(2, 3), held_factor=torch.ones(2) if normalize else None
    )
    seen = [(post.under_way, post.posted) for _ in block_row.visits(context, operands)]
    steps = steps_of(world_size)
    assert len(seen) == world_size and post.under_way == 0
    for (under_way, posted), step in zip(seen, steps, strict=True):
        # Of each exchange so far: features sent and received, and their factors as well.
        ahead = min(step + 1, steps[-1])
        assert posted == (2 if normalize else 1) * 2 * sum(1 <= s <= ahead for s in steps)
        assert (under_way > 0) == (step < steps[-1])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_gradients_travel_while_the_next_are_made(post: Post, world_size: int) -> None:
    steps, under_way = steps_of(world_size), []

    def parts() -> Iterator[Tensor]:
        for _ in steps:
            under_way.append(post.under_way)
            yield torch.zeros(2, 3)

    ring_of(world_size).home(parts())
    assert post.under_way == 0 and post.posted == 2 * (world_size - 1)
    for visit, step in enumerate(steps):
        if step > 1 and step != steps[visit - 1]:  # a step's first
            assert under_way[visit] > 0
