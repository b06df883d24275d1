"""The pieces that the autograd Functions of losses and statistics share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..kinds import kind_of
from .block import Block, Side
from .dtypes import accumulation_dtype
from .tiny_norms import EPS


def is_traced() -> bool:
    """True if tensors may be symbolic, so that nothing may depend on their values."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def differentiates(*inputs: Tensor | None) -> bool:
    """True if a gradient with respect to any of the inputs may be asked for."""
    if not torch.is_grad_enabled():
        return False
    if torch._C._are_functorch_transforms_active():
        return True
    return any(t is not None and t.requires_grad for t in inputs)


def bias_of(bias: Tensor | None, kind: str) -> Tensor | None:
    """The bias that engines get. It is None for a kind with a shift: there the bias cancels in a
    fused loss, and is added to the statistics of `contrast` at the end."""
    return None if kind_of(kind).has_shift else bias


def without_inputs(block: Block) -> Block:
    """The block without scale and biases. Its Function gets these as inputs of their own, and
    Dynamo does not accept the same tensor twice."""
    return block._replace(scale=None, bias=None, key_bias=None)


def with_inputs(
    block: Block, scale: Tensor, bias: Tensor | None, key_bias: Tensor | None = None
) -> Block:
    return block._replace(scale=scale, bias=bias_of(bias, block.kind), key_bias=key_bias)


def side_of(x: Tensor, dtype: torch.dtype, normalize: bool) -> Side:
    """The operand that products take for x, without a gradient."""
    # A Function gets both the input and the operand, and Dynamo takes no tensor twice.
    if is_traced():
        x = x.detach()
    if x.dtype == dtype and not normalize:
        return Side(x)
    with torch.no_grad():
        x = cast(x, dtype)
        if not normalize:
            return Side(x)
        norm = torch.linalg.vector_norm(x, dim=1, dtype=accumulation_dtype(x))
        return Side(x, norm.clamp_min_(EPS).reciprocal_())


def as_inputs(
    gradients: Sequence[Tensor], inputs: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Casts dx, dy, (dbias, dscale) to the dtypes and shapes of the inputs; None if not needed."""
    dx, dy, dbias_dscale = gradients
    x, y, scale, bias = inputs
    dbias, dscale = dbias_dscale.unbind()
    return (
        cast(dx, x.dtype) if needs[0] else None,
        cast(dy, y.dtype) if needs[1] else None,
        scalar_like(dscale, scale) if needs[2] else None,
        scalar_like(dbias, bias) if needs[3] else None,
    )


def scalar_like(value: Tensor, like: Tensor) -> Tensor:
    value = cast(value, like.dtype)
    return value if value.shape == like.shape else value.reshape(like.shape)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    # `to` takes a microsecond even without a change; a step of 32 pairs takes 130.
    return x if x.dtype == dtype else x.to(dtype)


def refuse_second_derivative(
    gradients: Sequence[Tensor | None], *sources: Tensor
) -> list[Tensor | None]:
    """Returns the gradients so that differentiating them, with respect to any source, raises."""
    return [None if d is None else _NoSecondDerivative.apply(d, *sources) for d in gradients]


class _NoSecondDerivative(torch.autograd.Function):
    """The identity on a gradient; its backward raises instead of returning zeros."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> None:
        raise RuntimeError(
            "fastclip's losses have no second derivative: their gradient was differentiated "
            "(create_graph=True); use backend='reference', which is plain PyTorch"
        )


def refuse_forward_mode(*inputs: Tensor | None) -> None:
    """Raises a clear RuntimeError where torch's own would not name the cause."""
    if forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in inputs):
        raise RuntimeError(
            "fastclip's losses have no forward-mode derivative (torch.func.jvp, dual numbers): "
            "use reverse mode, or backend='reference', which is plain PyTorch"
        )


class WeighedGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, factor: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        wide = torch.promote_types(g.dtype, torch.float32)
        return (g.to(wide) * factor.reshape(()).to(wide)).to(g.dtype), None
