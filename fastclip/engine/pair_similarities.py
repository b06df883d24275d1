"""Similarities of chosen pairs, O((M + N + P) D): `<x_i, y_j>` for P pairs (i, j)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .autograd import cast, refuse_second_derivative, side_of
from .block import Side
from .dtypes import state_dtype
from .feature_gradient import FeatureGradient
from .group_sums import CHUNK, sums_at


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
        for _, of_x, of_y in _chunks(sides, i.shape[0]):
            # Not in place: under torch.vmap only the features may have samples.
            found = found + (of_x[i] * of_y[j]).sum(1)
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
    outs = [torch.zeros_like(t, dtype=wide) for t in (x, y)]
    added = [
        FeatureGradient(side, out, g.dtype) if needed else None
        for side, out, needed in zip(sides, outs, needs, strict=False)
    ]
    for place, of_x, of_y in _chunks(sides, i.shape[0]):
        for gradient, unit, own, other, others in (
            (added[0], of_x, i, of_y, j), (added[1], of_y, j, of_x, i)
        ):  # fmt: skip
            if gradient is not None:
                gradient.add(sums_at(own, g[:, None] * other[others], unit.shape[0]), unit, place)
    if normalize:
        for place, of_x, of_y in _chunks(sides, i.shape[0]):
            for gradient, unit in zip(added, (of_x, of_y), strict=True):
                if gradient is not None:
                    gradient.project(unit, place)
    return [
        cast(out, t.dtype) if needed else None
        for out, t, needed in zip(outs, (x, y), needs, strict=False)
    ]


def _chunks(sides: list[Side], pairs: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The columns of both sides' features, normalised, some at a time."""
    width = sides[0].features.shape[1]
    dtype = state_dtype(sides[0].features.device)
    lines = sum(side.features.shape[0] for side in sides) + 2 * pairs
    step = max(1, CHUNK // (8 * max(lines, 1)))
    for start in range(0, width, step):
        place = slice(start, min(start + step, width))
        columns = []
        for side in sides:
            features = side.features[:, place].to(dtype)
            columns.append(features if side.factor is None else features * side.factor[:, None])
        yield place, *columns
