"""The differentiable loss: two operators, and O(M + N) plain PyTorch between them.

`fused_loss` is what every public loss calls after its checks. It sweeps once for the loss, weighs
once for the gradients, and asks for nothing that nobody wants: no backward without gradients, no
gradient of a frozen tower, no second sweep for a loss whose weights need no state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .epilogues import EPILOGUES
from .ops import accumulation_dtype, rows_to_keep, state_dtype

EPS = 1e-12  # F.normalize's

REDUCTIONS = ("none", "mean", "sum")


class Plan(NamedTuple):
    """What a call asks for besides its tensors."""

    loss: str
    engine: str
    dtype: torch.dtype  # of the products
    normalize: bool
    reduction: str
    memory_budget: int


def fused_loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    """The loss of paired features x, y (N, D); scale, bias of one element each."""
    if torch.is_grad_enabled() and (
        x.requires_grad
        or y.requires_grad
        or scale.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        return _FusedLoss.apply(x, y, scale, bias, *plan)
    problem = _problem(x, y, scale, bias, plan)
    op = getattr(torch.ops.fastclip.sweep, plan.engine)
    state, positive, _ = op(*problem, None, 0, plan.loss, 0)
    return _loss(state, positive, problem, plan)


def _problem(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, plan: Plan) -> tuple[Any, ...]:
    """x, y, factor_x, factor_y, scale, bias as the operators take them."""
    x, y = x.to(plan.dtype), y.to(plan.dtype)
    bias = bias if EPILOGUES[plan.loss].uses_bias else None
    if not plan.normalize:
        return x, y, None, None, scale, bias
    return x, y, _factor(x), _factor(y), scale, bias


def _factor(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=1, dtype=accumulation_dtype(x))
    return norm.clamp_min_(EPS).reciprocal_()


def _lines(state: Tensor, positive: Tensor, problem: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """reference, sum (2, N): rows and columns; and the positives' logits (N)."""
    scale, bias = problem[4:]
    s = positive * scale.reshape(()).to(positive.dtype)
    if bias is not None:
        s = s + bias.reshape(()).to(s.dtype)
    reference, sum = state.unflatten(1, (2, -1))
    return reference, sum, s


def _loss(state: Tensor, positive: Tensor, problem: tuple[Any, ...], plan: Plan) -> Tensor:
    lines = EPILOGUES[plan.loss].line_loss(*_lines(state, positive, problem))
    if plan.reduction == "mean":
        loss = lines.mean()
    elif plan.reduction == "sum":
        loss = lines.sum() / 2
    else:
        loss = lines.mean(0)
    return loss.to(accumulation_dtype(problem[0]))


def _share(n: int, reduction: str) -> float:
    """What each pair's loss counts in the result."""
    return 1 / n if reduction == "mean" else 1.0


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, *plan_fields: Any
    ) -> Tensor:
        plan = Plan(*plan_fields)
        needs_x, needs_y = ctx.needs_input_grad[:2]
        problem = _problem(x, y, scale, bias, plan)
        ctx.plan = plan
        ctx.in_one_go = (
            not EPILOGUES[plan.loss].needs_state
            and plan.reduction != "none"
            and _unit_gradients_fit(x, y, needs_x, needs_y, plan)
        )
        if ctx.in_one_go:
            op = getattr(torch.ops.fastclip.sweep_and_weigh, plan.engine)
            share = _share(x.shape[0], plan.reduction)
            gain = scale.detach().reshape(()).to(state_dtype(x.device)) * share
            state, positive, u, v, totals = op(
                *problem, gain, 0, plan.loss, needs_x, needs_y, plan.normalize
            )
            reference, sum, s = _lines(state, positive, problem)
            _, q = EPILOGUES[plan.loss].line_weights(reference[0], sum[0], s)
            totals = (totals + torch.stack((q.sum(), (q * positive).sum()))) * share
            ctx.save_for_backward(x, y, scale, bias, u, v, totals)
        else:
            op = getattr(torch.ops.fastclip.sweep, plan.engine)
            keep = 0
            if plan.engine != "torch":
                itemsize = accumulation_dtype(problem[0]).itemsize
                keep = rows_to_keep(x.shape[0], y.shape[0], itemsize, plan.memory_budget)
            state, positive, kept = op(*problem, None, 0, plan.loss, keep)
            ctx.save_for_backward(x, y, scale, bias, *problem[:4], state, positive, kept)
        return _loss(state, positive, problem, plan)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            dx, dy, dscale, dbias = (_unit_backward if ctx.in_one_go else _weigh_backward)(ctx, g)
        gradients = [dx, dy, dscale, dbias]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            inputs = ctx.saved_tensors[:3]
            gradients = [
                None if d is None else _NoSecondDerivative.apply(d, g, *inputs) for d in gradients
            ]
        return *gradients, *(None for _ in ctx.plan)


def _unit_gradients_fit(x: Tensor, y: Tensor, needs_x: bool, needs_y: bool, plan: Plan) -> bool:
    """Whether gradients for upstream 1 may wait in fp32 for the backward.

    Where the features have that dtype they become the gradients; else they are work space.
    """
    waiting = x.shape[0] * x.shape[1] * needs_x + y.shape[0] * y.shape[1] * needs_y
    dtype = torch.float64 if plan.dtype == torch.float64 else torch.float32
    if x.dtype == y.dtype == dtype:
        return True
    return waiting * dtype.itemsize <= plan.memory_budget


def _unit_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, y, scale, bias, u, v, totals = ctx.saved_tensors
    needs_x, needs_y, needs_scale, needs_bias = ctx.needs_input_grad[:4]
    # The usual upstream is 1: then the waiting gradient is the gradient. On a GPU asking would wait
    # for the device.
    is_one = not torch.compiler.is_compiling() and g.device.type == "cpu" and bool(g == 1)

    def gradient(unit: Tensor, dtype: torch.dtype) -> Tensor:
        return (unit if is_one else unit * g).to(dtype)

    totals = totals * g
    return (
        gradient(u, x.dtype) if needs_x else None,
        gradient(v, y.dtype) if needs_y else None,
        _scalar(totals[1], scale) if needs_scale else None,
        _scalar(totals[0], bias) if needs_bias else None,
    )


def _weigh_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, y, scale, bias, *problem, state, positive, kept = ctx.saved_tensors
    plan = ctx.plan
    epilogue = EPILOGUES[plan.loss]
    needs_x, needs_y, needs_scale, needs_bias = ctx.needs_input_grad[:4]
    needs_bias_sum = needs_bias and epilogue.uses_bias
    dx = dy = dscale = dbias = None
    if needs_x or needs_y or needs_scale or needs_bias_sum:
        problem = (*problem, scale, bias if epilogue.uses_bias else None)
        g = g.to(state.dtype)
        coefficients, q = epilogue.line_weights(*_lines(state, positive, problem))
        q = q.sum(0)
        if plan.reduction == "none":
            # Weights keep order 1, whatever the upstream gradients: a common factor goes outside.
            largest = g.abs().amax()
            relative = g / torch.where(largest > 0, largest, 1)
            coefficients, q, g = coefficients * relative, q * relative, largest
        gain = g * (_share(x.shape[0], plan.reduction) / 2)
        op = getattr(torch.ops.fastclip.weigh, plan.engine)
        dx, dy, totals = op(
            *problem, state, coefficients.flatten(), q, gain * scale.reshape(()).to(gain.dtype),
            kept, 0, plan.loss, needs_x, needs_y, plan.normalize, x.dtype, y.dtype,
        )  # fmt: skip
        if needs_scale:
            dscale = _scalar((totals[1] + (q * positive).sum()) * gain, scale)
        if needs_bias_sum:
            dbias = _scalar((totals[0] + q.sum()) * gain, bias)
    if needs_bias and dbias is None:
        dbias = torch.zeros_like(bias)
    return dx if needs_x else None, dy if needs_y else None, dscale, dbias


def _scalar(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.dtype).reshape(like.shape)


class _NoSecondDerivative(torch.autograd.Function):
    """Passes a gradient on; being differentiated it refuses, instead of returning zeros."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> None:
        raise RuntimeError(
            "fastclip's losses have no second derivative: their gradient was differentiated "
            "(create_graph=True); use backend='reference', which is plain PyTorch"
        )
