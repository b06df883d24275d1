"""The differentiable loss of paired features, made of the operators sweep, finish and weigh.

`fused_loss` sweeps once for the loss and weighs once for the gradients; `finish` between them is
O(M + N). It computes no gradient that is not requested (a frozen tower, `no_grad`). For a kind
whose weights need no state it makes loss and gradients in one sweep (`sweep_and_weigh`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kinds import kind_of
from . import operators
from .autograd import (
    as_inputs,
    bias_of,
    differentiates,
    is_traced,
    refuse_forward_mode,
    refuse_second_derivative,
    scalar_like,
    side_of,
    with_inputs,
    without_inputs,
)
from .block import Block, Side, SweepResults, Upstream, Wanted
from .dtypes import state_dtype
from .kept import KEPT_BY


class LossOptions(NamedTuple):
    """The options of one fused loss, checked, with the engine chosen."""

    kind: str
    engine: str
    dtype: torch.dtype  # of the products
    normalize: bool
    reduction: str
    memory_budget: int
    # Set by `fused_loss`.
    needs_x: bool = False
    needs_y: bool = False
    at_once: bool = False


def fused_loss(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, options: LossOptions
) -> Tensor:
    """The loss of paired features x, y (N, D). scale, bias: one element each."""
    traced = is_traced()
    refuse_forward_mode(x, y, scale, bias)
    block = _block(x, y, scale, bias, options)
    if differentiates(x, y, scale, bias):
        # torch.func may differentiate tensors whose requires_grad is False.
        every = torch._C._are_functorch_transforms_active()
        needs_x, needs_y = x.requires_grad or every, y.requires_grad or every
        at_once = _makes_gradients_at_once(x, y, needs_x, needs_y, options)
        options = options._replace(needs_x=needs_x, needs_y=needs_y, at_once=at_once)
        if not traced:
            return _FusedLoss.apply(x, y, scale, bias, block, options)
        value, *_ = _TracedLoss.apply(x, y, scale, bias, *without_inputs(block).flat(), *options)
        return value
    state, positive, _ = operators.sweep(options.engine, block)
    losses, _, _ = _finish(block, state, positive, options)
    return _reduce(losses, options)


def _block(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, options: LossOptions) -> Block:
    sides = (
        side_of(x, options.dtype, options.normalize),
        side_of(y, options.dtype, options.normalize),
    )
    return Block(*sides, scale, bias_of(bias, options.kind), kind=options.kind)


def _finish(
    block: Block, state: Tensor, positive: Tensor, options: LossOptions
) -> tuple[Tensor, Tensor, Tensor]:
    return operators.finish(options.engine, state, positive, block.scale, block.bias, options.kind)


def _reduce(losses: Tensor, options: LossOptions) -> Tensor:
    """Reduces the losses of rows, then of columns (2 N)."""
    dtype = torch.float64 if options.dtype == torch.float64 else torch.float32
    if options.reduction == "mean":
        return losses.mean(dtype=dtype)
    if options.reduction == "sum":
        return losses.sum(dtype=dtype) / 2
    return losses.unflatten(0, (2, -1)).mean(0, dtype=dtype)


def _pair_weight(n: int, reduction: str) -> float:
    """The factor of each pair's loss in the result."""
    return 1 / n if reduction == "mean" else 1.0


def _forward(block: Block, options: LossOptions) -> tuple[Tensor, Sequence[Tensor]]:
    """Returns the value and the tensors that the backward takes."""
    if options.at_once:
        state, positive, *gradients = _sweep_and_weigh(block, options)
        losses, _, _ = _finish(block, state, positive, options)
        return _reduce(losses, options), gradients
    keep = KEPT_BY[options.engine].keep(block, options.memory_budget)
    state, positive, kept = operators.sweep(options.engine, block, keep=keep)
    losses, coefficients, weights = _finish(block, state, positive, options)
    return _reduce(losses, options), (state, positive, kept, coefficients, weights)


LossInputs = tuple[Tensor, Tensor, Tensor, "Tensor | None"]  # x, y, scale, bias


def _save(
    ctx: Any, inputs: LossInputs, block: Block, found: Sequence[Tensor], options: LossOptions
) -> None:
    ctx.options = options
    operands = block.x.features, block.x.factor, block.y.features, block.y.factor
    ctx.save_for_backward(*inputs, *operands, *found)


def _backward(ctx: Any, g: Tensor) -> Sequence[Tensor | None]:
    """The gradients of x, y, scale and bias."""
    x, y, scale, bias, x_operand, factor_x, y_operand, factor_y, *found = ctx.saved_tensors
    kind = ctx.options.kind
    sides = Side(x_operand, factor_x), Side(y_operand, factor_y)
    block = Block(*sides, scale, bias_of(bias, kind), kind=kind)
    with torch.no_grad():
        make = _scale_backward if ctx.options.at_once else _weigh_backward
        gradients = make(ctx, block, (x, y, scale, bias), found, g)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        gradients = refuse_second_derivative(gradients, g, x, y, scale)
    return gradients


class _FusedLoss(torch.autograd.Function):
    """The loss in eager mode."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        block: Block,
        options: LossOptions,
    ) -> Tensor:
        value, found = _forward(block, options)
        ctx.waiting = None
        if options.at_once:
            ctx.waiting, found = found, ()
        _save(ctx, (x, y, scale, bias), block, found, options)
        return value

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(ctx, g), None, None


class _TracedLoss(torch.autograd.Function):
    """The loss for torch.compile and torch.func: they need flat arguments, and all tensors of the
    backward among inputs and outputs. In eager mode it would cost 100 us more, since torch inspects
    the signature of its forward at every call."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        _, block, options = _unpacked(arguments)
        value, found = _forward(block, options)
        return value, *found

    @staticmethod
    def setup_context(ctx: Any, arguments: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        inputs, block, options = _unpacked(arguments)
        _, *found = output
        ctx.mark_non_differentiable(*found)
        _save(ctx, inputs, block, found, options)

    @staticmethod
    def backward(ctx: Any, g: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
        return *_backward(ctx, g), *(None for _ in range(Block.COUNT + len(ctx.options)))


def _unpacked(arguments: tuple[Any, ...]) -> tuple[LossInputs, Block, LossOptions]:
    x, y, scale, bias, *rest = arguments
    block, options = Block.of(rest)
    return (x, y, scale, bias), with_inputs(block, scale, bias), LossOptions(*options)


def _makes_gradients_at_once(
    x: Tensor, y: Tensor, needs_x: bool, needs_y: bool, options: LossOptions
) -> bool:
    """True if the forward makes the gradients, for an upstream gradient of 1.

    This needs weights that are known before the sweep, and memory in which the gradients wait for
    the backward, in fp32 (fp64 for fp64 features). If both towers' features have that dtype, the
    waiting tensors become the returned gradients. Otherwise they are extra memory. It is always
    taken on GPUs, where one sweep less saves a quarter of the time, and on CPUs if it fits the
    memory budget.
    """
    if not kind_of(options.kind).is_linear or options.reduction == "none":
        return False
    # Torch 2.11 compiles no product of a symbolic size and a bool.
    waiting = x.shape[0] * x.shape[1] * int(needs_x) + y.shape[0] * y.shape[1] * int(needs_y)
    dtype = torch.float64 if options.dtype == torch.float64 else torch.float32
    if x.dtype == y.dtype == dtype or x.device.type == "cuda":
        return True
    return waiting * dtype.itemsize <= options.memory_budget


def _sweep_and_weigh(block: Block, options: LossOptions) -> tuple[Tensor, ...]:
    x = block.x.features
    weight = _pair_weight(x.shape[0], options.reduction)
    gain = torch.full((), weight, dtype=state_dtype(x.device), device=x.device)
    return operators.sweep_and_weigh(
        options.engine, block, gain, options.needs_x, options.needs_y, options.normalize
    )


def _scale_backward(
    ctx: Any, block: Block, inputs: LossInputs, found: Sequence[Tensor], g: Tensor
) -> Sequence[Tensor | None]:
    """Scales the gradients that the forward has made for an upstream gradient of 1."""
    if found:
        gradients = [gradient * g for gradient in found]
    else:
        # The gradients that waited become x.grad, which later steps write to, so they are handed
        # over. A second backward through a retained graph makes new ones.
        gradients, ctx.waiting = ctx.waiting, None
        if gradients is None:
            _, _, *gradients = _sweep_and_weigh(block, ctx.options)
        # The upstream gradient is usually 1. Reading it on a GPU would wait for the device.
        if g.device.type != "cpu" or g.item() != 1:
            for gradient in gradients:
                gradient.mul_(g)
    return as_inputs(gradients, inputs, ctx.needs_input_grad)


def _weigh_backward(
    ctx: Any, block: Block, inputs: LossInputs, found: Sequence[Tensor], g: Tensor
) -> Sequence[Tensor | None]:
    state, positive, kept, coefficients, weights = found
    options, (x, y, scale, bias) = ctx.options, inputs
    needs_x, needs_y, needs_scale, needs_bias = ctx.needs_input_grad[:4]
    dx = dy = dscale = dbias = None
    sees_bias = block.bias is not None
    if needs_x or needs_y or needs_scale or (needs_bias and sees_bias):
        weights = weights.unflatten(0, (2, -1)).sum(0)
        if options.reduction == "none":
            # The largest upstream gradient goes into the gain, so that weights are of order 1.
            largest = g.abs().amax()
            relative = (g / torch.where(largest > 0, largest, 1)).to(state.dtype)
            coefficients, weights = coefficients * relative.repeat(2), weights * relative
            g = largest
        gain = g * (_pair_weight(x.shape[0], options.reduction) / 2)
        dx, dy, totals, _ = operators.weigh(
            options.engine, block, SweepResults(state, positive, kept),
            Upstream(coefficients, weights, gain),
            Wanted(needs_x, needs_y, False, options.normalize, x.dtype, y.dtype),
        )  # fmt: skip
        dbias, dscale = totals.unbind()
    if needs_bias:
        dbias = scalar_like(dbias, bias) if sees_bias else torch.zeros_like(bias)
    return (
        dx if needs_x else None,
        dy if needs_y else None,
        scalar_like(dscale, scale) if needs_scale else None,
        dbias if needs_bias else None,
    )
