"""A rank's block of rows, `S[own rows, all columns]`, and its two sweeps.

`exchange.py` delivers the columns in visits. The states of rows are complete on their rank. The
states of columns are partial on each rank, and the ranks merge them. States, positives and
coefficients are O(B).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..engine import operators
from ..engine.autograd import cast
from ..engine.block import NO_POSITIVES, Block, Side, SweepResults, Upstream, Wanted
from ..engine.dtypes import accumulation_dtype, state_dtype
from ..engine.kept import KEPT_BY
from ..engine.operators import Gradients
from ..engine.tiny_norms import CLAMPED
from ..engine.torch_engine import merge
from ..kinds import Kind, kind_of
from .exchange import Gathered, Ring, Visit
from .shard import Shard


class BlockRow(NamedTuple):
    """This rank's rows (m) by all columns (B).

    block: its y has the features that this rank holds, but factors, ids, thresholds and biases of
    all columns. The own positive of row i is this rank's column i + offset.
    """

    engine: str
    columns: Gathered | Ring
    normalize: bool
    block: Block

    @classmethod
    def of(cls, engine: str, columns: Gathered | Ring, normalize: bool, own: Block) -> BlockRow:
        """Gathers the columns of a block of own rows and own columns."""
        features, *vectors = own.y

        def gathered(vector: Tensor | None) -> Tensor | None:
            return None if vector is None else columns.shard.gather(vector)

        y = Side(columns.held(features), *map(gathered, vectors))
        block = own._replace(y=y, key_bias=gathered(own.key_bias))
        return cls(engine, columns, normalize, block)

    @property
    def shard(self) -> Shard:
        return self.columns.shard

    @property
    def kind(self) -> type[Kind]:
        return kind_of(self.block.kind)

    @property
    def rows(self) -> int:
        return self.block.x.features.shape[0]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors that a Function saves; `with_tensors` puts them back."""
        return self.block.flat()[:-_OPTION_COUNT]

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> BlockRow:
        block, _ = Block.of((*tensors, *self.block.flat()[-_OPTION_COUNT:]))
        return self._replace(block=block)

    def without_tensors(self) -> BlockRow:
        return self.with_tensors((None,) * TENSOR_COUNT)

    def part(self, rows: slice, features: Tensor, columns: slice | Tensor, offset: int) -> Block:
        """The block of some own rows and of some columns, with the columns' features."""

        def of(places: slice | Tensor, vectors: Sequence[Tensor | None]) -> list[Tensor | None]:
            return [None if vector is None else vector[places] for vector in vectors]

        x, y = Side(*of(rows, self.block.x)), Side(features, *of(columns, self.block.y[1:]))
        (key_bias,) = of(columns, [self.block.key_bias])
        return self.block._replace(x=x, y=y, key_bias=key_bias, offset=offset)

    def visited(self, rows: slice, visit: Visit) -> Block:
        """The block of some own rows and a visit's columns, with own positives if it has any."""
        offset = NO_POSITIVES
        if visit.has_own and with_positive(self.rows, self.shard.rows, self.block.offset) > 0:
            own_columns = self.shard.start - visit.columns.start
            offset = rows.start + self.block.offset + own_columns
        return self.part(rows, visit.features, visit.columns, offset)

    def bound(self) -> Tensor | None:
        """An upper bound of |t| on all ranks, one element; None for a kind without a shift. With it
        all ranks take the same shift, so that the sums of a column on different ranks can be added.
        If it is NaN or infinite, every rank takes shifts of its own."""
        if not self.kind.has_shift:
            return None
        x = self.block.x.features
        dtype = state_dtype(x.device)
        if self.normalize:
            return torch.ones((), dtype=dtype, device=x.device)
        longest = [_longest(t) for t in (x, self.columns.own(self.block.y.features))]
        return self.shard.max(torch.stack(longest)).prod().to(dtype)


_OPTION_COUNT = 4  # the number of a block's fields that are no tensors; they come last
# The number of tensors in a block, flat: those of both sides, scale and biases.
TENSOR_COUNT = 2 * len(Side._fields) + len(Block._fields) - 2 - _OPTION_COUNT


def with_positive(m: int, n: int, offset: int) -> int:
    """Returns how many of m rows have an own positive among n columns."""
    return max(0, min(m, n - offset) - max(0, -offset))


def _longest(x: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(x, dim=1, dtype=accumulation_dtype(x))
    return norms.amax() if norms.shape[0] else norms.new_zeros(())


class Swept(NamedTuple):
    """The results of the first sweep."""

    state: Tensor  # (2 or 4, m + B): own rows are complete, columns have this rank's part
    positive: Tensor  # (m)
    kept: tuple[Tensor, ...]  # one for each visit


Occupied = Callable[[Block], Tensor | None]


def sweep(
    row: BlockRow, rows: slice, budget: int, occupied: Occupied = lambda block: None
) -> Swept:
    """Sweeps some own rows by all columns. budget: bytes of products that may be kept for the
    second sweep. occupied: maps a visit's block to the operator's argument."""
    m, shard = row.rows, row.shard
    bound = row.bound()
    x = row.block.x.features
    state = torch.zeros(
        (4 if row.block.same_id_positive else 2, m + shard.batch),
        dtype=state_dtype(x.device), device=x.device,
    )  # fmt: skip
    of_rows, of_columns = state[:, :m][:, rows], state[:, m:]
    positive, kept = state.new_zeros(m), []
    positive[rows] = torch.nan
    for visit in row.columns.start(row.block.y.features):
        block = row.visited(rows, visit)
        if 0 in block.sizes():
            kept.append(x.new_empty(0))
            continue
        keep = KEPT_BY[row.engine].keep(block, budget * block.sizes()[1] // shard.batch)
        found = operators.sweep(row.engine, block, bound, occupied(block), keep)
        kept.append(found.kept)
        count = block.sizes()[0]
        of_columns[:, visit.columns] = found.state[:, count:]
        if visit.has_own:  # the first one
            of_rows.copy_(found.state[:, :count])
            positive[rows] = found.positive
            continue
        for k in range(0, len(state), 2):
            merge(*of_rows[k : k + 2], *found.state[k : k + 2, :count])
    return Swept(state, positive, tuple(kept))


def merge_columns(state: Tensor, kind: type[Kind], shard: Shard) -> Tensor:
    """Merges the ranks' states of columns (2 or 4, B).

    Usually all shifts are the same number and only sums are added. If a rank had to take shifts of
    its own, powers of two relate them.
    """
    shift, sums = state[::2], state[1::2]
    if kind.has_shift:
        absent = sums == 0
        top = shard.max(torch.where(absent, -torch.inf, shift))
        top = torch.where(top == -torch.inf, 0, top)
        sums = torch.where(absent, 0, sums * (shift - top).exp2())
        shift = top
    return torch.stack((shift, shard.sum(sums.contiguous())), 1).flatten(0, 1)


class RowWeighing(NamedTuple):
    """The second sweep: gradients of the live rows and columns, in fp32 at least.

    upstream: coefficients (m + B, or two rows of them) and positives' weights (m), with upstream
    gradients included.
    """

    row: BlockRow
    swept: Swept  # with complete states
    upstream: Upstream

    def run(self, needs_x: bool, needs_y: bool, needs_key_bias: bool = False) -> Gradients:
        """Returns dx (m, D) and dy (n, D) of this rank, and its part of dbias and dscale and of
        dkey_bias (B)."""
        row, shard = self.row, self.row.shard
        x, live, all_live = row.block.x.features, shard.live[shard.rank], shard.all_live
        rows = slice(0, row.rows) if all_live else live
        dx = x.new_zeros(x.shape if needs_x else (0,), dtype=accumulation_dtype(x))
        totals = self.swept.state.new_zeros(2)
        dkey_bias = totals.new_zeros(shard.batch if needs_key_bias else 0)
        needs = needs_x, needs_y and all_live, needs_key_bias
        journey = row.columns.start(row.block.y.features, shard if all_live else shard.of_live)
        # All visits must be iterated over, even if there is no gradient to give back: other ranks
        # wait for the features that this one sends on.
        for visit, kept in zip(journey, self.swept.kept, strict=True):
            block = row.visited(rows, visit)
            found = self._weigh(block, rows, visit.columns, kept, *needs)
            totals += found.bias_scale
            if needs_x:
                dx[rows].add_(found.x)
            if needs_key_bias:
                dkey_bias[visit.columns] = found.key_bias
            if needs_y:
                journey.give_back(found.y if all_live else self._live_columns(visit))
        if not needs_y:
            return Gradients(dx, dx.new_zeros(0), totals, dkey_bias)
        dy = journey.finish()
        if not all_live:
            of_live, dy = dy, dx.new_zeros((shard.rows, x.shape[1]))
            dy[live] = of_live
        return Gradients(dx, dy, totals, dkey_bias)

    def _live_columns(self, visit: Visit) -> Tensor:
        """dy of the visit's live columns, over all own rows."""
        row, shard = self.row, self.row.shard
        pairs = shard.live[shard.rank]
        picked, own = row.columns.live(visit)
        start = visit.columns.start
        columns: slice | Tensor = (
            slice(picked.start + start, picked.stop + start) if isinstance(picked, slice)
            else picked + start
        )  # fmt: skip
        y = visit.features[picked]
        total = torch.zeros(y.shape, dtype=accumulation_dtype(y), device=y.device)
        for rows in (slice(0, pairs.start), pairs, slice(pairs.stop, row.rows)):
            # Rows that are not live have no positive among these columns.
            offset = own if rows is pairs and own is not None else NO_POSITIVES
            block = row.part(rows, y, columns, offset)
            total += self._weigh(block, rows, columns, self.swept.kept[0], False, True, False).y
        return total

    def _weigh(
        self, block: Block, rows: slice, columns: slice | Tensor, kept: Tensor, needs_x: bool,
        needs_y: bool, needs_key_bias: bool,
    ) -> Gradients:  # fmt: skip
        state, positive, _ = self.swept
        coefficients, weights, gain = self.upstream
        dtype, width = accumulation_dtype(block.x.features), block.x.features.shape[1]
        if 0 in block.sizes():
            m, n = block.sizes()
            nothing = [
                block.x.features.new_zeros((k if needed else 0, width), dtype=dtype)
                for k, needed in ((m, needs_x), (n, needs_y))
            ]
            return Gradients(
                *nothing, state.new_zeros(2), state.new_zeros(n if needs_key_bias else 0)
            )
        own = self.row.rows

        def of_lines(values: Tensor) -> Tensor:
            return torch.cat((values[..., :own][..., rows], values[..., own:][..., columns]), -1)

        return operators.weigh(
            self.row.engine, block, SweepResults(of_lines(state), positive[rows], kept),
            Upstream(of_lines(coefficients), weights[rows], gain),
            Wanted(needs_x, needs_y, needs_key_bias, self.row.normalize, dtype, dtype),
        )  # fmt: skip


def to_features(gradient: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Casts a gradient to the features' dtype. Rows with a norm below 1e-12 were divided by 1e-12;
    in fp16 they get 0 instead of infinity, as in one process."""
    if dtype == torch.float16 and factor is not None:
        gradient = gradient.masked_fill(factor[:, None] >= CLAMPED, 0)
    return cast(gradient, dtype)
