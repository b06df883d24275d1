"""Similarities of chosen pairs, O((M + N + P) D): `<x_i, y_j>` for P pairs (i, j)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .autograd import cast, refuse_second_derivative, side_of
from .block import Block, Side
from .dtypes import state_dtype
from .feature_gradient import FeatureGradient
from .group_sums import Chunk, chunks, sums_at


def pair_similarities(
    x: Tensor, y: Tensor, i: Tensor, j: Tensor, dtype: torch.dtype, normalize: bool
) -> Tensor:
    """Returns (P), in the dtype of states, differentiable in x (M, D) and y (N, D). i, j (P): rows
    of x and of y. dtype: the features are rounded to it first, as in an engine's products."""
    return _PairSimilarities.apply(x, y, i, j, dtype, normalize)


class _PairSimilarities(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, y: Tensor, i: Tensor, j: Tensor, dtype: torch.dtype, normalize: bool
    ) -> Tensor:
        sides = [side_of(t, dtype, normalize) for t in (x, y)]
        found = torch.zeros(i.shape, dtype=state_dtype(x.device), device=x.device)
        for chunk in _chunks(sides, i.shape[0]):
            # Not in place: under torch.vmap only the features may have samples.
            found = found + (chunk.x[i] * chunk.y[j]).sum(1)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.dtype, ctx.normalize = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, y, i, j = ctx.saved_tensors
        with torch.no_grad():
            gradients = _gradients(x, y, i, j, g, ctx.dtype, ctx.normalize, ctx.needs_input_grad)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            gradients = refuse_second_derivative(gradients, g, x, y)
        return *gradients, None, None, None, None


def _gradients(
    x: Tensor, y: Tensor, i: Tensor, j: Tensor, g: Tensor, dtype: torch.dtype, normalize: bool,
    needs: tuple[bool, ...],
) -> list[Tensor | None]:  # fmt: skip
    sides = [side_of(t, dtype, normalize) for t in (x, y)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    outs = [g.new_zeros(t.shape, dtype=wide) for t in (x, y)]  # with g's samples in torch.vmap
    added = [
        FeatureGradient(side, out, g.dtype) if needed else None
        for side, out, needed in zip(sides, outs, needs, strict=False)
    ]
    for chunk in _chunks(sides, i.shape[0]):
        for gradient, unit, own, other, others in (
            (added[0], chunk.x, i, chunk.y, j), (added[1], chunk.y, j, chunk.x, i)
        ):  # fmt: skip
            if gradient is not None:
                new = sums_at(own, g[:, None] * other[others], unit.shape[0])
                gradient.add(new, unit, chunk.place)
    if normalize:
        for chunk in _chunks(sides, i.shape[0]):
            for gradient, unit in zip(added, chunk[:2], strict=True):
                if gradient is not None:
                    gradient.project(unit, chunk.place)
    return [
        cast(out, t.dtype) if needed else None
        for out, t, needed in zip(outs, (x, y), needs, strict=False)
    ]


def _chunks(sides: Sequence[Side], pairs: int) -> Iterator[Chunk]:
    x, y = sides
    device = x.features.device
    block = Block(x, y, torch.ones((), device=device))
    lines = x.features.shape[0] + y.features.shape[0] + 2 * pairs
    return chunks(block, None, lines, state_dtype(device))
