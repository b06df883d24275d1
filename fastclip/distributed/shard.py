"""One rank's part of a batch that is spread over a process group, and its exchanges with others.

All of it is collectives on tensors of known sizes, which `agreement.py` ensures. Ranks are ranks
within the group.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import gather_rows, scatter_sum_rows


class Parcel(NamedTuple):
    """A tensor that is sent to the rank at this distance from this one, or, if it `arrives`,
    received from that rank."""

    tensor: Tensor
    distance: int
    arrives: bool


class Shard(NamedTuple):
    """Rank k has `sizes[k]` items of the batch, from number `starts[k]` on. The items are pairs for
    a loss. For `contrast` they are the rows of y: the columns of the logits."""

    group: dist.ProcessGroup | None  # None: a single rank, without exchanges
    rank: int
    sizes: tuple[int, ...]
    starts: tuple[int, ...]
    # The rows of each rank that this step differentiates; its other rows are constants.
    live: tuple[slice, ...]
    # needs_x: at least one rank needs gradients of its x; needs_y, needs_key_bias: likewise. All
    # ranks then take part in the exchange of these gradients.
    needs_x: bool
    needs_y: bool
    needs_key_bias: bool = False
    # For `contrast`, the largest number of rows of x on a rank; 0: all ranks have this rank's.
    most_rows: int = 0

    @property
    def world_size(self) -> int:
        return len(self.sizes)

    @property
    def rows(self) -> int:
        return self.sizes[self.rank]

    @property
    def start(self) -> int:
        return self.starts[self.rank]

    def rows_of(self, rank: int) -> slice:
        return slice(self.starts[rank], self.starts[rank] + self.sizes[rank])

    def at(self, distance: int) -> int:
        """The rank at this distance: after this one, or before it if negative."""
        return (self.rank + distance) % self.world_size

    @property
    def mine(self) -> slice:
        return self.rows_of(self.rank)

    @property
    def batch(self) -> int:
        """The number of items of all ranks: pairs for a loss, columns for `contrast`."""
        return self.starts[-1] + self.sizes[-1]

    @property
    def is_even(self) -> bool:
        return len(set(self.sizes)) == 1

    @property
    def all_live(self) -> bool:
        return self.live == _all_rows(self.sizes)

    @property
    def of_live(self) -> Shard:
        """A shard of only the live rows of all ranks."""
        sizes = tuple(rows.stop - rows.start for rows in self.live)
        return self._replace(sizes=sizes, starts=starts_of(sizes), live=_all_rows(sizes))

    def where_live(self, device: torch.device) -> Tensor:
        """The places of all ranks' live rows in the batch, int64."""
        rows = self.live[0]
        if self.is_even and len({(r.start, r.stop) for r in self.live}) == 1:
            # The usual case: nothing is copied to the device.
            starts = torch.arange(self.world_size, device=device) * self.rows
            return (starts[:, None] + torch.arange(rows.start, rows.stop, device=device)).flatten()
        parts = [
            torch.arange(start + r.start, start + r.stop)
            for start, r in zip(self.starts, self.live, strict=True)
        ]
        return torch.cat(parts).to(device)

    def gather(self, x: Tensor) -> Tensor:
        """Returns all ranks' rows (B, ...), in the order of ranks."""
        if self.world_size == 1:
            return x
        return gather_rows(x, self.sizes, self.group)

    def scatter_sum(self, x: Tensor) -> Tensor:
        """Returns this rank's rows of the sum over ranks of x (B, ...)."""
        if self.world_size == 1:
            return x
        return scatter_sum_rows(x, self.sizes, self.rank, self.group)

    def sum(self, x: Tensor) -> Tensor:
        """Sums over ranks, in place."""
        return self._reduce(x, dist.ReduceOp.SUM)

    def max(self, x: Tensor) -> Tensor:
        """Takes the maximum over ranks, in place."""
        return self._reduce(x, dist.ReduceOp.MAX)

    def _reduce(self, x: Tensor, op: dist.ReduceOp) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(x, op, group=self.group)
        return x

    def swap(self, parcels: list[Parcel]) -> list[dist.Work]:
        """Starts to send and receive; parcels between the same two ranks arrive in order."""
        operations = [
            dist.P2POp(
                dist.irecv if p.arrives else dist.isend, p.tensor, group=self.group,
                group_peer=self.at(p.distance),
            )
            for p in parcels
        ]  # fmt: skip
        return dist.batch_isend_irecv(operations) if operations else []

    def gather_scalar(self, x: Tensor) -> Tensor:
        """Returns each rank's number, (R)."""
        if self.world_size == 1:
            return x.reshape(1)
        return gather_rows(x.reshape(1), (1,) * self.world_size, self.group)

    def by_pair(self, x: Tensor) -> Tensor:
        """Repeats each rank's number in x (R) for all of its pairs, (B)."""
        if self.is_even:
            return x.repeat_interleave(self.sizes[0], output_size=self.batch)
        counts = torch.tensor(self.sizes, device=x.device)
        return x.repeat_interleave(counts, output_size=self.batch)


def starts_of(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(itertools.accumulate(sizes[:-1], initial=0))


def _all_rows(sizes: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in sizes)


def shard_of_one(x: Tensor, y: Tensor, live: tuple[int, int]) -> Shard:
    """The shard of a process without a group, which has the whole batch."""
    return Shard(None, 0, (x.shape[0],), (0,), (slice(*live),), x.requires_grad, y.requires_grad)
