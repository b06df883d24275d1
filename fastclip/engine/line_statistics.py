"""The differentiable statistics of rows and columns that `contrast` returns.

The forward sweeps once; the backward turns the upstream gradients into coefficients of lines and
weighs once. `line_formulas.py` has the formulas between these sweeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kinds import LineStatistics, kind_of
from . import operators, pairs
from .autograd import (
    as_inputs,
    cast,
    differentiates,
    is_traced,
    refuse_second_derivative,
    with_inputs,
    without_inputs,
)
from .block import Block, Side, SweepResults, Wanted
from .dtypes import accumulation_dtype, state_dtype
from .kept import KEPT_BY
from .line_formulas import (
    Request,
    as_line_statistics,
    means_upstream,
    statistics_from_states,
    upstream_of,
    wanted_statistics,
    with_levels,
)
from .line_means import LineMeans, local_groups
from .statistics_call import Lines, StatisticsInputs, StatisticsOptions
from .tiny_norms import EPS


def line_statistics(
    inputs: StatisticsInputs, block: Block, labels: Tensor | None, options: StatisticsOptions
) -> LineStatistics:
    """The statistics of the inputs' block, differentiable in the inputs. labels (M): the columns of
    the rows' own positives, if the block has no offset of them."""
    request = options.request
    with torch.no_grad():
        occupied = pairs.occupied(block, sum(block.sizes()), request.rows, request.columns)
        levels = None
        if kind_of(block.kind).has_levels:
            levels = pairs.levels(block, labels, inputs.bias, options.above)
    lines = Lines(occupied, labels, levels)
    if differentiates(*inputs):
        if is_traced():
            flat = without_inputs(block).flat()
            found = _TracedStatistics.apply(*inputs, *flat, *lines, *options.flat())
        else:
            found = _LineStatistics.apply(*inputs, block, lines, options)
    else:
        found, _ = _forward(inputs, block, lines, options, keeps=False)
    return wanted_statistics(found, request)


def _means_of(block: Block, labels: Tensor | None, request: Request) -> LineMeans | None:
    if labels is None and not request.means:
        return None
    groups, dtype = local_groups(block, labels, request.means), state_dtype(block.scale.device)
    lines = sum(block.sizes()) + max(kind.count for kind in groups.given)
    return LineMeans(block, groups, dtype, request.means, request.one_set, lines)


def _forward(
    inputs: StatisticsInputs, block: Block, lines: Lines, options: StatisticsOptions,
    keeps: bool = True,
) -> tuple[tuple[Tensor, ...], SweepResults]:  # fmt: skip
    keep = KEPT_BY[options.engine].keep(block, options.memory_budget) if keeps else 0
    statistics = operators.sweep(
        options.engine, block, occupied=lines.occupied, keep=keep, levels=lines.levels
    )
    state, request = statistics.state, options.request
    if request.one_set:
        # Each column is a row; weights need its shift.
        m = block.sizes()[0]
        state = torch.cat((state[:, :m], state[:, :m]), 1)
    found = statistics_from_states(
        block,
        state,
        statistics.positive,
        inputs.bias,
        request,
        _means_of(block, lines.labels, request),
    )
    return found, statistics._replace(state=state)


def _save(
    ctx: Any,
    inputs: StatisticsInputs,
    block: Block,
    lines: Lines,
    options: StatisticsOptions,
    output: tuple[Tensor, ...],
) -> None:
    ctx.set_materialize_grads(False)
    ctx.options = options
    ctx.block_options = block.offset, block.kind, block.same_id_positive, block.guided
    ctx.save_for_backward(*inputs, *block.x, *block.y, block.target_scale, *lines[1:], *output)


def _backward(ctx: Any, upstream: tuple[Any, ...]) -> list[Tensor | None]:
    """Gradients of the inputs."""
    saved, sides = ctx.saved_tensors, []
    inputs, saved = (
        StatisticsInputs(*saved[: len(StatisticsInputs._fields)]),
        saved[len(StatisticsInputs._fields) :],
    )
    for _ in range(2):
        sides.append(Side(*saved[: len(Side._fields)]))
        saved = saved[len(Side._fields) :]
    target_scale, labels, levels, *output = saved
    block = Block(*sides, inputs.scale, None, None, target_scale, *ctx.block_options)
    with torch.no_grad():
        block = with_inputs(block, *inputs[2:])
        lines = Lines(None, labels, levels)
        gradients = _gradients(ctx, inputs, block, lines, output, upstream)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        sources = [g for g in upstream if g is not None]
        gradients = refuse_second_derivative(gradients, *sources, *inputs[:3])
    return gradients


class _LineStatistics(torch.autograd.Function):
    """The statistics in eager mode."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *inputs, block, lines, options = arguments
        inputs = StatisticsInputs(*inputs)
        found, statistics = _forward(inputs, block, lines, options)
        _save(ctx, inputs, block, lines, options, (*found, *statistics))
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
        inputs, block, lines, options = _unpacked(arguments)
        ctx.mark_non_differentiable(*output[-len(SweepResults._fields) :])
        _save(ctx, inputs, block, lines, options, output)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        others = Block.COUNT + len(Lines._fields) + len(ctx.options.flat())
        return *_backward(ctx, upstream), *(None for _ in range(others))


def _unpacked(
    arguments: tuple[Any, ...],
) -> tuple[StatisticsInputs, Block, Lines, StatisticsOptions]:
    count, vectors = len(StatisticsInputs._fields), len(Lines._fields)
    block, others = Block.of(arguments[count:])
    lines, options = Lines(*others[:vectors]), others[vectors:]
    inputs = StatisticsInputs(*arguments[:count])
    block = with_inputs(block, *inputs[2:])
    return inputs, block, lines, StatisticsOptions.of(options)


def _gradients(
    ctx: Any,
    inputs: StatisticsInputs,
    block: Block,
    lines: Lines,
    output: Sequence[Tensor],
    upstream: tuple[Any, ...],
) -> list[Tensor | None]:
    needs = StatisticsInputs(*ctx.needs_input_grad[: len(StatisticsInputs._fields)])
    *found, state, positive, kept = output
    options, request = ctx.options, ctx.options.request
    found, given = (as_line_statistics(t, request) for t in (found, upstream))
    if (
        all(g is None for g in given._replace(positives=None))
        and lines.labels is None
        and not is_traced()
    ):
        of_own = given.positives
        return (
            [None] * len(needs)
            if of_own is None
            else _own_positives_backward(ctx, inputs, block, of_own)
        )
    line_means, of_means = _means_of(block, lines.labels, request), None
    if line_means is not None:
        of_means = line_means.factors(
            means_upstream(block, found, state, given, lines.labels is not None)
        )
    coefficients, of_bias = upstream_of(block, inputs.bias, found, state, given, request, of_means)
    dtypes = inputs.x.dtype, inputs.y.dtype
    if of_means is not None:
        dtypes = (accumulation_dtype(block.x.features),) * 2
    dx, dy, totals, dkey_bias = operators.weigh(
        options.engine, block, SweepResults(with_levels(state, lines.levels), positive, kept),
        coefficients,
        Wanted(needs.x, needs.y, needs.key_bias, options.normalize, *dtypes),
    )  # fmt: skip
    dbias, dscale = totals.unbind()
    if request.one_set:
        dbias, dscale = dbias / 2, dscale / 2
    if kind_of(block.kind).has_shift:
        dbias = of_bias
    if of_means is not None:
        more, more_key_bias = line_means.add_gradients(
            of_means, dx if needs.x else None, dy if needs.y else None
        )
        dscale, dkey_bias = dscale + more, dkey_bias + more_key_bias if needs.key_bias else None
        if not kind_of(block.kind).has_shift:
            dbias = dbias + of_means.of_bias
    return [
        *as_inputs((dx, dy, torch.stack((dbias, dscale))), inputs[:-1], needs[:-1]),
        cast(dkey_bias, inputs.key_bias.dtype) if needs.key_bias else None,
    ]


def _own_positives_backward(
    ctx: Any, inputs: StatisticsInputs, block: Block, g: Tensor
) -> list[Tensor | None]:
    """Gradients of the own positives' logits alone: autograd of their formula, O((M + N) D)."""
    needs = ctx.needs_input_grad[: len(StatisticsInputs._fields)]
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
