"""The differentiable statistics of rows and columns that `contrast` returns.

The forward sweeps once and returns logarithms (or sums) of states, O(M + N). The backward turns the
upstream gradients into coefficients of lines and weighs once. A coefficient is the upstream
gradient divided by the line's sum: times a pair's exponential it is the pair's weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kinds import LN2, LOG2E, Kind, LineStatistics, kind_of
from . import operators, pairs
from .autograd import (
    EPS,
    as_inputs,
    bias_of,
    cast,
    differentiates,
    is_traced,
    refuse_second_derivative,
    side_of,
    with_inputs,
    without_inputs,
)
from .block import Block, Side, Statistics, Upstream, Wanted
from .dtypes import accumulation_dtype
from .kept import KEPT_BY


class StatisticsOptions(NamedTuple):
    """The options of a call."""

    engine: str
    dtype: torch.dtype  # of the products
    normalize: bool
    rows: bool
    columns: bool
    memory_budget: int


class Inputs(NamedTuple):
    """The tensors that have gradients."""

    x: Tensor  # (M, D)
    y: Tensor  # (N, D)
    scale: Tensor  # one element
    bias: Tensor | None  # one element
    key_bias: Tensor | None  # (N)


def block_of(
    inputs: Inputs, ids: tuple[Tensor, Tensor] | None, margin: Tensor | None, offset: int,
    kind: str, same_id_positive: bool, options: StatisticsOptions,
) -> Block:  # fmt: skip
    """The block of the inputs, without gradients."""
    with torch.no_grad():
        x, y = (side_of(t, options.dtype, options.normalize) for t in inputs[:2])
        if ids is not None:
            codes = pairs.codes_of(*ids)
            x, y = x._replace(ids=codes[0]), y._replace(ids=codes[1])
        if margin is not None:
            limits = pairs.thresholds(x, y, offset, margin)
            x, y = x._replace(threshold=limits[0]), y._replace(threshold=limits[1])
        bias = bias_of(inputs.bias, kind)
        return Block(x, y, inputs.scale, bias, inputs.key_bias, offset, kind, same_id_positive)


def line_statistics(inputs: Inputs, block: Block, options: StatisticsOptions) -> LineStatistics:
    """The statistics of the inputs' block, differentiable in the inputs."""
    with torch.no_grad():
        occupied = pairs.occupied(block, sum(block.sizes()), options.rows, options.columns)
    if differentiates(*inputs):
        if is_traced():
            flat = without_inputs(block).flat()
            found = _TracedStatistics.apply(*inputs, *flat, occupied, *options)
        else:
            found = _LineStatistics.apply(*inputs, block, occupied, options)
    else:
        state, positive, _ = operators.sweep(options.engine, block, occupied=occupied)
        found = finish(block, state, positive, inputs.bias)
    return named(found, block.same_id_positive, options.rows, options.columns)


def named(
    found: tuple[Tensor, ...], same_id_positive: bool, rows: bool, columns: bool
) -> LineStatistics:
    """Returns `made_of`, with None in place of the statistics of a side that is not wanted."""
    every = made_of(found, same_id_positive)
    if not rows:
        every = every._replace(rows=None, row_positives=None)
    if not columns:
        every = every._replace(columns=None, column_positives=None)
    return every


def statistics_of(same_id_positive: bool) -> int:
    """The number of tensors that `finish` returns; those of positives by id come last."""
    fields = LineStatistics._fields
    return len(fields) if same_id_positive else fields.index("row_positives")


def made_of(found: Sequence[Tensor], same_id_positive: bool) -> LineStatistics:
    """Gives `finish`'s results their names, and drops the results that may follow in `found`."""
    return LineStatistics(*found[: statistics_of(same_id_positive)])


class States(NamedTuple):
    """The states of lines for one set of pairs: negatives, or positives by id."""

    shift: Tensor  # (L), in log2 units
    sums: Tensor  # (L)


def states_of(state: Tensor) -> list[States]:
    """Splits a state into that of negatives and, if it has four rows, of positives by id."""
    return [States(*one) for one in state.unflatten(0, (-1, 2))]


def statistic(kind: type[Kind], states: States) -> Tensor:
    """Returns the statistic of each line (L)."""
    shift, sums = states
    return (torch.log2(sums) + shift) * LN2 if kind.has_shift else sums


def finish(
    block: Block, state: Tensor, positive: Tensor, bias: Tensor | None
) -> tuple[Tensor, ...]:
    """Returns the fields of `LineStatistics`, by-id positives only with same_id_positive. A side
    may be empty."""
    kind, (m, _) = kind_of(block.kind), block.sizes()
    dtype = state.dtype
    common = 0.0 if bias is None else bias.reshape(()).to(dtype)
    moved = common if kind.has_shift else 0.0
    of_negatives, *of_by_id = states_of(state)
    negatives = statistic(kind, of_negatives) + moved
    positives = positive * block.scale.reshape(()).to(dtype) + common
    if block.key_bias is not None:
        positives = positives + pairs.at_rows(block.key_bias.to(dtype), m, block.offset, 0)
    found = (negatives[:m], negatives[m:], positives)
    if not of_by_id:
        return found
    by_id, own = statistic(kind, *of_by_id) + moved, _Own(block, positives)
    if kind.has_shift:
        by_id = torch.logaddexp(by_id, torch.where(own.exists, own.logits, -torch.inf))
    else:
        by_id = by_id + torch.where(own.exists, kind.fold(own.log2, own.log2 * 0), 0)
    return *found, by_id[:m], by_id[m:]


class _Own:
    """The own positives of each row, then of each column."""

    def __init__(self, block: Block, positives: Tensor) -> None:
        m, n = block.sizes()
        _, inside = pairs.partners(m, n, block.offset, positives.device)

        def of_lines(values: Tensor, absent: Any) -> Tensor:
            return torch.cat((values, pairs.at_columns(values, n, block.offset, absent)))

        self.exists = of_lines(inside, False)
        self.logits = of_lines(positives, torch.nan)
        self.sign = -1 if kind_of(block.kind).negates_positives else 1
        # In log2 units, with the sign that the kind gives to positives.
        self.log2 = self.logits * (self.sign * LOG2E)


def _forward(
    inputs: Inputs, block: Block, occupied: Tensor | None, options: StatisticsOptions
) -> tuple[tuple[Tensor, ...], Statistics]:
    keep = KEPT_BY[options.engine].keep(block, options.memory_budget)
    statistics = operators.sweep(options.engine, block, occupied=occupied, keep=keep)
    return finish(block, statistics.state, statistics.positive, inputs.bias), statistics


def _save(
    ctx: Any, inputs: Inputs, block: Block, options: StatisticsOptions, output: tuple[Tensor, ...]
) -> None:
    ctx.set_materialize_grads(False)
    ctx.options = options
    ctx.block_options = block.offset, block.kind, block.same_id_positive
    ctx.save_for_backward(*inputs, *block.x, *block.y, *output)


def _backward(ctx: Any, upstream: tuple[Any, ...]) -> list[Tensor | None]:
    """Gradients of the inputs."""
    saved, sides = ctx.saved_tensors, []
    inputs, saved = Inputs(*saved[: len(Inputs._fields)]), saved[len(Inputs._fields) :]
    for _ in range(2):
        sides.append(Side(*saved[: len(Side._fields)]))
        saved = saved[len(Side._fields) :]
    block = Block(*sides, inputs.scale, None, None, *ctx.block_options)
    with torch.no_grad():
        gradients = _gradients(ctx, inputs, with_inputs(block, *inputs[2:]), saved, upstream)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        sources = [g for g in upstream if g is not None]
        gradients = refuse_second_derivative(gradients, *sources, *inputs[:3])
    return gradients


class _LineStatistics(torch.autograd.Function):
    """The statistics in eager mode."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *inputs, block, occupied, options = arguments
        found, statistics = _forward(Inputs(*inputs), block, occupied, options)
        _save(ctx, Inputs(*inputs), block, options, (*found, *statistics))
        return found

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        return *_backward(ctx, upstream), None, None, None


class _TracedStatistics(torch.autograd.Function):
    """The statistics for torch.compile and torch.func. `fused_loss._TracedLoss` says why these need
    another Function."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        found, statistics = _forward(*_unpacked(arguments))
        return *found, *statistics

    @staticmethod
    def setup_context(ctx: Any, arguments: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        inputs, block, _, options = _unpacked(arguments)
        ctx.mark_non_differentiable(*output[-len(Statistics._fields) :])
        _save(ctx, inputs, block, options, output)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        others = Block.COUNT + 1 + len(ctx.options)
        return *_backward(ctx, upstream), *(None for _ in range(others))


def _unpacked(arguments: tuple[Any, ...]) -> tuple[Inputs, Block, Tensor | None, StatisticsOptions]:
    count = len(Inputs._fields)
    block, (occupied, *options) = Block.of(arguments[count:])
    inputs = Inputs(*arguments[:count])
    return inputs, with_inputs(block, *inputs[2:]), occupied, StatisticsOptions(*options)


def _gradients(
    ctx: Any, inputs: Inputs, block: Block, output: tuple[Tensor, ...], upstream: tuple[Any, ...]
) -> list[Tensor | None]:
    needs = Inputs(*ctx.needs_input_grad[: len(Inputs._fields)])
    *found, state, positive, kept = output
    found, given = (made_of(t, block.same_id_positive) for t in (found, upstream))
    if all(g is None for g in given._replace(positives=None)) and not is_traced():
        of_own = given.positives
        return [None] * len(needs) if of_own is None else _of_own(ctx, inputs, block, of_own)
    coefficients, of_bias = weights(block, inputs.bias, found, state, given)
    options = ctx.options
    dx, dy, totals, dkey_bias = operators.weigh(
        options.engine, block, Statistics(state, positive, kept), coefficients,
        Wanted(needs.x, needs.y, needs.key_bias, options.normalize, inputs.x.dtype, inputs.y.dtype),
    )  # fmt: skip
    if of_bias is not None:
        _, of_scale = totals
        totals = torch.stack((of_bias, of_scale))
    return [
        *as_inputs((dx, dy, totals), inputs[:-1], needs[:-1]),
        cast(dkey_bias, inputs.key_bias.dtype) if needs.key_bias else None,
    ]


def _of_own(ctx: Any, inputs: Inputs, block: Block, g: Tensor) -> list[Tensor | None]:
    """Gradients of the own positives' logits alone: autograd of their formula, O((M + N) D)."""
    needs = ctx.needs_input_grad[: len(Inputs._fields)]
    leaves = [
        None if t is None else t.detach().requires_grad_(needed)
        for t, needed in zip(inputs, needs, strict=True)
    ]
    x, y, scale, bias, key_bias = leaves
    with torch.enable_grad():
        wide = accumulation_dtype(block.x.features)
        sides = [t.to(ctx.options.dtype).to(wide) for t in (x, y)]
        if ctx.options.normalize:
            sides = [F.normalize(t, dim=1, eps=EPS) for t in sides]
        columns, inside = pairs.partners(*block.sizes(), block.offset, g.device)
        logits = scale.reshape(()).to(g.dtype) * (sides[0] * sides[1][columns]).sum(1).to(g.dtype)
        if bias is not None:
            logits = logits + bias.reshape(()).to(g.dtype)
        if key_bias is not None:
            logits = logits + key_bias.to(g.dtype)[columns]
        wanted = [t for t, needed in zip(leaves, needs, strict=True) if needed]
        found = iter(torch.autograd.grad(logits, wanted, torch.where(inside, g, 0)))
    return [next(found) if needed else None for needed in needs]


def weights(
    block: Block, bias: Tensor | None, found: LineStatistics, state: Tensor,
    upstream: LineStatistics,
) -> tuple[Upstream, Tensor | None]:  # fmt: skip
    """Returns the factors of pairs' weights for the upstream gradients of the statistics, and the
    gradient of a bias that the engine does not get. A side may be empty."""
    kind, (m, n) = kind_of(block.kind), block.sizes()
    given = LineStatistics(*(
        t if t is None else torch.zeros_like(t) if g is None else g.to(state.dtype)
        for t, g in zip(found, upstream, strict=True)
    ))  # fmt: skip
    negatives, *positives = states_of(state)
    _, inside = pairs.partners(m, n, block.offset, state.device)
    of_own = torch.where(inside, given.positives, 0)
    of_lines = torch.cat((given.rows, given.columns))
    every = [of_lines]
    coefficients = [of_lines]
    # The gradient of a bias that is common to all logits.
    total = of_lines.masked_fill(negatives.sums == 0, 0).sum() + of_own.sum()
    if kind.has_shift:
        coefficients = [torch.where(negatives.sums == 0, 0, of_lines / negatives.sums)]
    for states in positives:
        of_lines = torch.cat((given.row_positives, given.column_positives))
        every.append(of_lines)
        by_id = torch.cat((found.row_positives, found.column_positives))
        own = _Own(block, found.positives)
        # The gradient of each line with respect to its own positive's logit.
        share = of_lines * own.sign
        if kind.has_shift:
            nothing = by_id == -torch.inf
            of_lines = of_lines.masked_fill(nothing, 0)
            total = total + of_lines.sum()
            # In logarithms, since an own positive may exceed the others' shift by far.
            common = 0.0 if bias is None else bias.reshape(()).to(state.dtype)
            beside = torch.exp2(states.shift - (by_id - common) * LOG2E)
            # The own positive of a column that key_bias takes out is -inf.
            share = of_lines * torch.exp(own.logits - by_id.masked_fill(nothing, 0))
            of_lines = torch.where(states.sums == 0, 0, of_lines * beside)
        else:
            share = share * kind.activation(own.log2, own.log2 * 0)
        coefficients.append(of_lines)
        share = torch.where(own.exists, share, 0)
        of_own = of_own + share[:m] + pairs.at_rows(share[m:], m, block.offset, 0)
    # The largest upstream gradient goes into the gain, so that weights are of order 1.
    largest = torch.cat([of_own, *every, of_own.new_zeros(1)]).abs().amax()
    unit = torch.where(largest > 0, largest, 1)
    stacked = torch.stack(coefficients) if len(coefficients) > 1 else coefficients[0]
    return Upstream(stacked / unit, of_own / unit, largest), total if kind.has_shift else None
