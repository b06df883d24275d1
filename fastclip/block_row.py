"""A rank's block of rows, `S[own rows, all columns]`: two sweeps, block of columns by block.

`visits.py` brings the columns, all at once or rank by rank. Rows are complete here; columns are
partial sums that ranks add up. States, positives and coefficients are O(B).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .block import Block, Side, Statistics, Upstream, Wanted
from .chunked import merge
from .function import Plan, bias_of, side_of
from .kept import PLANS
from .kinds import Kind, kind_of
from .operands import accumulation_dtype, state_dtype
from .shard import Shard
from .visits import Gathered, Ring


class Sharing(NamedTuple):
    """Which value a rank returns, and which gradients come back to it.

    The default is exact: after a mean over ranks, as DDP takes it, all gradients are those of one
    process on the whole batch. The others are open_clip's (`distributed.py` has the table).
    """

    whole_value: bool = False  # the loss of all pairs, else the share of the rank's own
    from_others: bool = True  # of other ranks' losses, too
    ring: bool = False  # columns come rank by rank


class Context(NamedTuple):
    plan: Plan
    shard: Shard
    sharing: Sharing

    @property
    def columns(self) -> Gathered | Ring:
        return (Ring if self.sharing.ring else Gathered)(self.shard)

    @property
    def kind(self) -> type[Kind]:
        return kind_of(self.plan.kind)

    @property
    def pairs(self) -> slice:
        """This rank's live ones, whose losses its value has."""
        return self.shard.live[self.shard.rank]

    def finish(self, state: Tensor, positive: Tensor, scale: Tensor, bias: Tensor | None) -> Any:
        return ops.finish(
            self.plan.engine, state.contiguous(), positive, scale, bias, self.plan.kind
        )


class Operands(NamedTuple):
    """Of the operators, but for the columns, of which this is what a rank holds."""

    x: Tensor
    held: Tensor
    factor_x: Tensor | None
    held_factor: Tensor | None
    scale: Tensor
    bias: Tensor | None

    @classmethod
    def of(
        cls, context: Context, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None
    ) -> Operands:
        plan = context.plan
        rows, columns = (side_of(t, plan.dtype, plan.normalize) for t in (x, y))
        held = [
            None if t is None else context.columns.held(t)
            for t in (columns.features, columns.factor)
        ]
        bias = bias_of(bias, plan.kind)
        return cls(rows.features, held[0], rows.factor, held[1], scale, bias)


class Columns(NamedTuple):
    """A block of columns, those of the batch from `start` on."""

    y: Tensor
    factor: Tensor | None
    start: int

    @property
    def where(self) -> slice:
        return slice(self.start, self.start + self.y.shape[0])


def visits(context: Context, o: Operands) -> Iterator[Columns]:
    factors = None
    if o.held_factor is not None:
        factors = context.columns.visits(o.held_factor)
    for y, where in context.columns.visits(o.held):
        yield Columns(y, None if factors is None else next(factors)[0], where.start)


def block(
    context: Context, o: Operands, rows: slice, y: Tensor, factor_y: Tensor | None, offset: int
) -> Block:
    factor_x = None if o.factor_x is None else o.factor_x[rows]
    sides = Side(o.x[rows], factor_x), Side(y, factor_y)
    return Block(*sides, o.scale, o.bias, offset=offset, kind=context.plan.kind)


def _bound(context: Context, o: Operands) -> Tensor | None:
    """Of |t| on all ranks: with it they take one reference, and columns' sums add up as they are.
    A NaN or infinity in it makes every rank take references of its own."""
    if not context.kind.has_shift:
        return None
    dtype = state_dtype(o.x.device)
    if context.plan.normalize:
        return torch.ones((), dtype=dtype, device=o.x.device)
    longest = [
        torch.linalg.vector_norm(t, dim=1, dtype=accumulation_dtype(t)).amax()
        for t in (o.x, context.columns.own(o.held))
    ]
    return context.shard.max(torch.stack(longest)).prod().to(dtype)


def merge_columns(state: Tensor, shard: Shard) -> Tensor:
    """States (2, B) of the ranks' blocks to those of all their pairs.

    As a rule all references are one number and this adds sums; where a rank had to take references
    of its own, powers of two relate them.
    """
    reference, sums = state
    absent = sums == 0
    top = shard.max(torch.where(absent, -torch.inf, reference))
    top = torch.where(top == -torch.inf, 0, top)
    return torch.stack((top, shard.sum(torch.where(absent, 0, sums * (reference - top).exp2()))))


class Swept(NamedTuple):
    """Between the sweeps, of a rank with b pairs."""

    state: Tensor  # (2, b + B): own rows, then all columns
    positive: Tensor  # (b)
    coefficients: Tensor  # (b + B)
    of_rows: Tensor  # (b): the positives' weights, as their rows have them
    of_columns: Tensor  # (b): as their columns have them
    kept: tuple[Tensor, ...]  # products, of each visit


def sweep(context: Context, o: Operands, budget: int) -> tuple[Tensor, Swept]:
    """The sum of the losses of this rank's pairs, and what the second sweep needs. Budget: bytes
    of products that may be kept for it."""
    plan, shard, pairs = context.plan, context.shard, context.pairs
    m, needs_state = shard.rows, context.kind.has_shift
    # A row's weights need other rows' states only through columns.
    swept = slice(0, m) if needs_state else pairs
    bound = _bound(context, o)
    state = torch.zeros((2, m + shard.batch), dtype=state_dtype(o.x.device), device=o.x.device)
    rows, columns = state[:, :m], state[:, m:]
    positive, kept = rows.new_zeros(m), []
    for k, visit in enumerate(visits(context, o)):
        n = visit.y.shape[0]
        offset = shard.start + swept.start - visit.start
        here_block = block(context, o, swept, visit.y, visit.factor, offset)
        keep = PLANS[plan.engine].keep(here_block, budget * n // shard.batch)
        found, here, products = ops.sweep(plan.engine, here_block, bound, keep=keep)
        kept.append(products)
        count = swept.stop - swept.start
        columns[:, visit.where] = found[:, count:]
        if k == 0:  # own columns come first, or with all others: here are the positives
            rows[:, swept], positive[swept] = found[:, :count], here
        else:
            merge(*rows[:, swept], *found[:, :count])
    if not needs_state:
        losses, coefficients, weights = context.finish(rows, positive, o.scale, o.bias)
        # A sum over pairs: a rank's share are its rows, its columns belong to the others' rows.
        coefficients = torch.cat((coefficients, coefficients.new_zeros(shard.batch)))
        swept_rows = Swept(state, positive, coefficients, weights, weights * 0, tuple(kept))
        return losses[pairs].sum(), swept_rows
    columns.copy_(merge_columns(columns, shard))
    positives = torch.cat((positive, shard.gather(positive)))
    losses, coefficients, weights = context.finish(state, positives, o.scale, o.bias)
    own = (losses[:m][pairs].sum() + losses[m:][shard.mine][pairs].sum()) / 2
    # A pair counts half its row's and half its column's loss.
    return own, Swept(
        state, positive, coefficients / 2, weights[:m] / 2, weights[m:][shard.mine] / 2, tuple(kept)
    )


class Weighing(NamedTuple):
    """The second sweep: gradients, in fp32 at least, for coefficients a (b), b (B) and positives'
    weights (b) that upstream gradients are part of."""

    context: Context
    operands: Operands
    swept: Swept
    gain: Tensor

    def run(
        self, a: Tensor, b: Tensor, positive_weight: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dx and own rows of dy (b, D); this rank's part of dbias and dscale."""
        context, x = self.context, self.operands.x
        dx = x.new_zeros(x.shape if needs[0] else (0,), dtype=accumulation_dtype(x))
        totals = []
        pairs, at_once = context.pairs, context.shard.all_live
        weights = a, b, positive_weight

        def parts() -> Iterator[Tensor]:
            for visit, kept in zip(visits(context, self.operands), self.swept.kept, strict=True):
                offset = context.shard.start + pairs.start - visit.start
                more, dy, sums = self._weigh(
                    pairs, visit.y, visit.factor, visit.where, offset, weights,
                    (needs[0], needs[1] and at_once), kept,
                )  # fmt: skip
                if needs[0]:
                    dx[pairs].add_(more)
                totals.append(sums)
                yield dy if at_once or not needs[1] else self._live_columns(visit, weights)

        # Every visit has to be made, whether or not it leaves something to take home.
        if not needs[1]:
            return dx, [*parts()][-1], torch.stack(totals).sum(0)
        if at_once:
            dy = context.columns.home(parts())
        else:
            dy = dx.new_zeros(x.shape)
            dy[pairs] = type(context.columns)(context.shard.of_live).home(parts())
        return dx, dy, torch.stack(totals).sum(0)

    def _live_columns(self, visit: Columns, weights: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """dy of the visit's live columns, from all own rows."""
        shard, pairs = self.context.shard, self.context.pairs
        picked, own = self.context.columns.live(visit.start, visit.y.device)
        if isinstance(picked, slice):
            where: slice | Tensor = slice(picked.start + visit.start, picked.stop + visit.start)
        else:
            where = picked + visit.start
        y, factor = visit.y[picked], None if visit.factor is None else visit.factor[picked]
        total = None
        for rows in (slice(0, pairs.start), pairs, slice(pairs.stop, shard.rows)):
            if rows.start == rows.stop:
                continue
            # Of rows beside the live ones no positive is among these columns.
            offset = own if rows is pairs and own is not None else y.shape[0]
            _, part, _ = self._weigh(
                rows, y, factor, where, offset, weights, (False, True), self.swept.kept[0]
            )
            total = part if total is None else total.add_(part)
        return total

    def _weigh(
        self, rows: slice, y: Tensor, factor_y: Tensor | None, columns: slice | Tensor,
        offset: int, weights: tuple[Tensor, Tensor, Tensor], needs: tuple[bool, bool],
        kept: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        plan, (a, b, positive_weight) = self.context.plan, weights
        state, positive = self.swept.state, self.swept.positive
        dtype = accumulation_dtype(y)
        state = torch.cat((state[:, : len(a)][:, rows], state[:, len(a) :][:, columns]), 1)
        upstream = torch.cat((a[rows], b[columns])), positive_weight[rows], self.gain
        return ops.weigh(
            plan.engine, block(self.context, self.operands, rows, y, factor_y, offset),
            Statistics(state, positive[rows], kept), Upstream(*upstream),
            Wanted(*needs, False, plan.normalize, dtype, dtype),
        )[:3]  # fmt: skip
