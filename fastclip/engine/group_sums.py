"""Sums of features over groups of lines: the linear part of statistics, O((M + N) D).

The sum of a row's logits over the columns of a group is `scale * <x_i, sum of y_j>`. The work goes
in chunks of D, so that the groups' sums take a few MiB however many groups there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import pairs
from .autograd import is_traced
from .block import Block

# Bytes of one chunk of float64 sums and operands.
CHUNK = 8 << 20


class Groups(NamedTuple):
    """Rows and columns in groups. Across ranks, rows and columns are a rank's own, and numbers of
    groups mean the same on all ranks."""

    of_rows: Tensor  # (M) int64 in [0, count]; count: a row without a group
    of_columns: Tensor  # (N) int64 in [0, count)
    count: int
    over_ranks: Callable[[Tensor], Tensor]  # sums over ranks, in place
    # (M), (N): the column and the row of own pairs, which are left out; N and M: none.
    own: tuple[Tensor, Tensor] | None = None
    is_one: bool = False  # all lines are in one group

    def of_every_row(self, values: Tensor) -> Tensor:
        """Sums values of columns (N, C) over each row's group: (M, C)."""
        if self.is_one:
            return self._sum(values).expand(self.of_rows.shape[0], -1)
        found = self._sums(self.of_columns, values)[self.of_rows]
        return found if self.own is None else found - _padded(values)[self.own[0]]

    def of_every_column(self, values: Tensor) -> Tensor:
        """Sums values of rows (M, C) over each column's group: (N, C)."""
        if self.is_one:
            return self._sum(values).expand(self.of_columns.shape[0], -1)
        found = self._sums(self.of_rows, values)[self.of_columns]
        return found if self.own is None else found - _padded(values)[self.own[1]]

    def _sum(self, values: Tensor) -> Tensor:
        return self.over_ranks(values.sum(0, keepdim=True))

    def without_own(self, offset: int) -> Groups:
        """The groups without own pairs: the pair of row i and column i + offset, if both are in one
        group. A line's sum over its own pair alone is then exactly 0."""
        m, n = self.of_rows.shape[0], self.of_columns.shape[0]
        same = self.of_rows == pairs.at_rows(self.of_columns, m, offset, -1)
        rows, columns = (torch.arange(k, device=same.device) for k in (m, n))
        of_rows = torch.where(same, pairs.at_rows(columns, m, offset, n), n)
        of_columns = pairs.at_columns(torch.where(same, rows, m), n, offset, m)
        return self._replace(own=(of_rows, of_columns))

    def _sums(self, groups: Tensor, values: Tensor) -> Tensor:
        return self.over_ranks(sums_at(groups, values, self.count + 1))


def _padded(values: Tensor) -> Tensor:
    return torch.cat((values, values.new_zeros((1, values.shape[1]))))


def sums_at(places: Tensor, values: Tensor, count: int) -> Tensor:
    """Sums rows of values (L, C) that have the same place: (count, C), in a fixed order."""
    if is_traced():
        # Not in place: under torch.vmap only the places or only the values may have samples.
        none = values.new_zeros((count, values.shape[1]))
        if values.device.type == "cuda":
            # On CUDA index_put sorts first, so sums do not depend on the order of threads. On CPUs
            # they would.
            return none.index_put((places,), values, accumulate=True)
        return none.index_add(0, places, values)
    # On CPUs this is 7 times as fast as index_add, which adds number by number.
    ordered, order = places.sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(count, device=places.device))
    return F.embedding_bag(order, values, starts, mode="sum")


class Chunk(NamedTuple):
    """Some of the columns of x (M, C) and y (N, C), normalised, in the state's dtype."""

    x: Tensor
    y: Tensor
    scale: Tensor | float
    place: slice | None  # of the features' columns; None: the chunk of key_bias


def chunks(
    block: Block, alive: Tensor | None, lines: int, dtype: torch.dtype, one_set: bool = False
) -> Iterator[Chunk]:
    """Cuts the block's features into chunks. The last one stands for key_bias: it is a feature of
    y, and x has a 1 there.

    alive: bool (N, 1), the columns that key_bias does not take out; None: all.
    one_set: y is x.
    lines: the numbers of rows, columns and groups, added. Ranks exchange the sums of each chunk, so
    all of them must pass the same number.
    """
    m, width = block.sizes()[0], block.x.features.shape[1]
    # A graph holds the number of chunks, but not their widths: it serves other sizes, too. The
    # length of the range is a constant there, which keeps symbolic widths simple.
    parts = range(-(-width // max(1, CHUNK // (8 * (lines + 1)))))
    count = len(parts)
    for k in parts:
        place = slice(width * k // count, width * (k + 1) // count)
        sides = []
        for side in (block.x,) if one_set else (block.x, block.y):
            features = side.features[:, place].to(dtype)
            sides.append(features if side.factor is None else features * side.factor[:, None])
        yield Chunk(sides[0], sides[-1], block.scale.reshape(()).to(dtype), place)
    if block.key_bias is not None:
        bias = block.key_bias.to(dtype)[:, None]
        if alive is not None:
            bias = torch.where(alive, bias, 0)
        yield Chunk(bias.new_ones((m, 1)), bias, 1.0, None)
