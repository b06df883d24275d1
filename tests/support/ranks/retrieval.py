"""Ranks and metrics across ranks, for `test_distributed_retrieval.py`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from support.retrieval_oracle import features
from torch import Tensor

from fastclip import distributed


class Spread(NamedTuple):
    """Features of a kind over ranks, with ids or in pairs."""

    kind: str
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    groups: tuple[int, int] | None  # numbers of different ids on each side; None: pairs
    backend: str | None = None

    def whole(self) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        m, n = sum(self.queries), sum(self.keys)
        ids = None
        if self.groups:
            ids = torch.arange(m) % self.groups[0], torch.arange(n) % self.groups[1]
        x, y = (features(self.kind, k, 6, k + s, torch.float32) for s, k in enumerate((m, n)))
        return x, y, ids

    def of_rank(self, rank: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        x, y, ids = self.whole()
        x, y = x.split(self.queries)[rank], y.split(self.keys)[rank]
        if ids is not None:
            ids = ids[0].split(self.queries)[rank], ids[1].split(self.keys)[rank]
        return x, y, ids


def ranks(rank: int, world_size: int, every: list[Spread]) -> list[Any]:
    found = []
    for spread in every:
        x, y, ids = spread.of_rank(rank)
        both = distributed.ranks(x, y, ids=ids, backend=spread.backend)
        rows = distributed.ranks(x, y, ids=ids, backend=spread.backend, columns=False)
        assert torch.equal(rows.rows, both.rows) and rows.columns is None
        found.append((both.rows, both.columns))
    return found


def metrics(rank: int, world_size: int, spread: Spread) -> dict[str, float]:
    x, y, ids = spread.of_rank(rank)
    return distributed.metrics(list(x.split(2)), y, 10.0, ids=ids)


def error(rank: int, world_size: int, by_rank: list[dict[str, Any]]) -> str:
    """The error of a call with this rank's arguments."""
    given = dict(by_rank[rank])
    x, y = torch.ones(*given.pop("x", (4, 3))), torch.ones(*given.pop("y", (4, 3)))
    x[0, 0] = given.pop("value", 1.0)
    try:
        getattr(distributed, given.pop("name", "ranks"))(x, y, **given)
    except (TypeError, ValueError, RuntimeError) as raised:
        return str(raised)
    return "no error"
