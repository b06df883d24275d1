"""The shards of compiled losses. A fake gets a shard that exchanges nothing; the backward gets the
forward's shard, rebuilt from what the forward saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..agreement import NEEDS, group_named, group_of, ranks_of
from ..shard import Parcel, Shard, starts_of
from .rank_operator import Trace


def check_ranks(trace: Trace) -> None:
    """Raises RuntimeError if the group has another size than when the graph was made. All ranks see
    the same size, so all raise, and none waits for another."""
    ranks = ranks_of(group_named(trace.group))
    if ranks != trace.ranks:
        raise RuntimeError(
            "a compiled loss must run in the process group that it was compiled in, of "
            f"{trace.ranks} ranks, got one of {ranks}: compile after init_process_group"
        )


class Pretended(Shard):
    """A shard whose exchanges send nothing and return tensors of the right shapes."""

    __slots__ = ()

    def gather(self, x: Tensor) -> Tensor:
        return x if self.world_size == 1 else x.new_empty((self.batch, *x.shape[1:]))

    def _reduce(self, x: Tensor, op: Any) -> Tensor:
        return x

    def swap(self, parcels: list[Parcel]) -> list[dist.Work]:
        return []


def exchanged_needs(shard: Shard) -> Tensor:
    """The fields `NEEDS` of a shard, as a tensor that the forward saves: without it the backward
    would have to exchange them again. It is on the CPU, so that reading it does not wait for a
    device."""
    needs = [int(getattr(shard, name)) for name in NEEDS]
    return torch.tensor(needs, dtype=torch.int64, device="cpu")


def _even(
    kind: type[Shard], trace: Trace, rank: int, n: int, live: Sequence[int] | None, needs: Any,
    group: dist.ProcessGroup | None = None,
) -> Shard:  # fmt: skip
    sizes = (n,) * trace.ranks
    rows = slice(0, n) if live is None else slice(*live)
    return kind(group, rank, sizes, starts_of(sizes), (rows,) * trace.ranks, *needs)


def pretended_shard(trace: Trace, n: int, live: Sequence[int] | None = None) -> Shard:
    # Results have the same shapes on all ranks, and any rank may want gradients of y.
    return _even(Pretended, trace, 0, n, live, (True, True, True))


def rebuilt_shard(trace: Trace, n: int, live: Sequence[int] | None, needs: Tensor) -> Shard:
    group = group_of(group_named(trace.group))
    rank = 0 if group is None else dist.get_rank(group)
    return _even(Shard, trace, rank, n, live, map(bool, needs.tolist()), group)
