"""The differentiable loss: two operators, and O(M + N) plain PyTorch between them.

`fused_loss` is what every public loss calls after its checks. It sweeps once for the loss, weighs
once for the gradients, and asks for nothing that nobody wants: no backward without gradients, no
gradient of a frozen tower, no second sweep for a loss whose weights need no state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .epilogues import EPILOGUES
from .kept import PLANS
from .operands import accumulation_dtype, state_dtype

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
    state, positive, _ = operator("sweep", plan)(*problem, None, 0, plan.loss, 0)
    losses, _, _ = operator("finish", plan)(state, positive, *problem[4:], plan.loss)
    return _reduce(losses, plan)


def operator(name: str, plan: Plan) -> Callable[..., Any]:
    return getattr(getattr(torch.ops.fastclip, name), plan.engine)


def _problem(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, plan: Plan
) -> tuple[Any, ...]:
    """x, y, factor_x, factor_y, scale, bias, as the operators take them."""
    x, y = cast(x, plan.dtype), cast(y, plan.dtype)
    bias = bias if EPILOGUES[plan.loss].uses_bias else None
    if not plan.normalize:
        return x, y, None, None, scale, bias
    return x, y, factor_of(x), factor_of(y), scale, bias


def factor_of(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=1, dtype=accumulation_dtype(x))
    return norm.clamp_min_(EPS).reciprocal_()


def _reduce(losses: Tensor, plan: Plan) -> Tensor:
    """Losses of rows, then of columns (2 N) to the result."""
    dtype = torch.float64 if plan.dtype == torch.float64 else torch.float32
    if plan.reduction == "mean":
        return losses.mean(dtype=dtype)
    if plan.reduction == "sum":
        return losses.sum(dtype=dtype) / 2
    return losses.unflatten(0, (2, -1)).mean(0, dtype=dtype)


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
            state, positive, *gradients = _sweep_and_weigh(problem, plan, needs_x, needs_y)
            if torch.compiler.is_compiling():
                ctx.save_for_backward(x, y, scale, bias, *gradients)
            else:
                ctx.save_for_backward(x, y, scale, bias)
                ctx.waiting = gradients
        else:
            keep = PLANS[plan.engine].keep(*problem[:2], plan.memory_budget)
            state, positive, kept = operator("sweep", plan)(*problem, None, 0, plan.loss, keep)
        losses, coefficients, weights = operator("finish", plan)(
            state, positive, *problem[4:], plan.loss
        )
        if not ctx.in_one_go:
            ctx.save_for_backward(
                x, y, scale, bias, *problem[:4], state, positive, coefficients, weights, kept
            )
        return _reduce(losses, plan)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            dx, dy, dscale, dbias = (_unit_backward if ctx.in_one_go else _weigh_backward)(ctx, g)
        gradients = [dx, dy, dscale, dbias]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            gradients = refuse_second_derivative(gradients, g, *ctx.saved_tensors[:3])
        return *gradients, *(None for _ in ctx.plan)


def _unit_gradients_fit(x: Tensor, y: Tensor, needs_x: bool, needs_y: bool, plan: Plan) -> bool:
    """Whether gradients for upstream 1 may wait in fp32 for the backward.

    Where the features have that dtype they become the gradients; else they are work space, which
    GPUs have: there a sweep saved is a quarter of the time.
    """
    # Torch 2.11 compiles no product of a symbolic size and a bool.
    waiting = x.shape[0] * x.shape[1] * int(needs_x) + y.shape[0] * y.shape[1] * int(needs_y)
    dtype = torch.float64 if plan.dtype == torch.float64 else torch.float32
    if x.dtype == y.dtype == dtype or x.device.type == "cuda":
        return True
    return waiting * dtype.itemsize <= plan.memory_budget


def _sweep_and_weigh(
    problem: tuple[Any, ...], plan: Plan, needs_x: bool, needs_y: bool
) -> tuple[Tensor, ...]:
    x = problem[0]
    share = _share(x.shape[0], plan.reduction)
    gain = torch.full((), share, dtype=state_dtype(x.device), device=x.device)
    op = operator("sweep_and_weigh", plan)
    return op(*problem, gain, 0, plan.loss, needs_x, needs_y, plan.normalize)


def _unit_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, y, scale, bias, *gradients = ctx.saved_tensors
    needs_x, needs_y, needs_scale, needs_bias = ctx.needs_input_grad[:4]
    if torch.compiler.is_compiling():
        dx, dy, dbias_dscale = (gradient * g for gradient in gradients)
    else:
        # What waits is given away: it becomes x.grad, which later steps write to. A second backward
        # through a retained graph makes its own.
        waiting, ctx.waiting = ctx.waiting, None
        if waiting is None:
            problem = _problem(x, y, scale, bias, ctx.plan)
            _, _, *waiting = _sweep_and_weigh(problem, ctx.plan, needs_x, needs_y)
        dx, dy, dbias_dscale = waiting
        # The usual upstream is 1. On a GPU asking would wait for it.
        if g.device.type != "cpu" or g.item() != 1:
            for gradient in waiting:
                gradient.mul_(g)
    dbias, dscale = dbias_dscale.unbind()
    return (
        cast(dx, x.dtype) if needs_x else None,
        cast(dy, y.dtype) if needs_y else None,
        scalar_like(dscale, scale) if needs_scale else None,
        scalar_like(dbias, bias) if needs_bias else None,
    )


def _weigh_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, y, scale, bias, *problem, state, positive, coefficients, weights, kept = ctx.saved_tensors
    plan = ctx.plan
    uses_bias = EPILOGUES[plan.loss].uses_bias
    needs_x, needs_y, needs_scale, needs_bias = ctx.needs_input_grad[:4]
    dx = dy = dscale = dbias = None
    if needs_x or needs_y or needs_scale or (needs_bias and uses_bias):
        weights = weights.unflatten(0, (2, -1)).sum(0)
        if plan.reduction == "none":
            # Weights keep order 1, whatever the upstream gradients: a common factor goes outside.
            largest = g.abs().amax()
            relative = (g / torch.where(largest > 0, largest, 1)).to(state.dtype)
            coefficients, weights = coefficients * relative.repeat(2), weights * relative
            g = largest
        dx, dy, dbias_dscale = operator("weigh", plan)(
            *problem, scale, bias if uses_bias else None, state, positive, coefficients, weights,
            g * (_share(x.shape[0], plan.reduction) / 2), kept, 0, plan.loss,
            needs_x, needs_y, plan.normalize, x.dtype, y.dtype,
        )  # fmt: skip
        dbias, dscale = dbias_dscale.unbind()
    if needs_bias:
        dbias = scalar_like(dbias, bias) if uses_bias else torch.zeros_like(bias)
    return (
        dx if needs_x else None,
        dy if needs_y else None,
        scalar_like(dscale, scale) if needs_scale else None,
        dbias if needs_bias else None,
    )


def scalar_like(value: Tensor, like: Tensor) -> Tensor:
    value = cast(value, like.dtype)
    return value if value.shape == like.shape else value.reshape(like.shape)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    # A call that has nothing to do still takes a microsecond, of 130 for 32 pairs.
    return x if x.dtype == dtype else x.to(dtype)


def refuse_second_derivative(
    gradients: Sequence[Tensor | None], *sources: Tensor
) -> list[Tensor | None]:
    """Gradients that fail when they are differentiated, with respect to any of the sources."""
    return [None if d is None else _NoSecondDerivative.apply(d, *sources) for d in gradients]


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
