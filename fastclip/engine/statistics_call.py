"""One call of `contrast`: its differentiable inputs, its options, and the block that they make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import pairs
from .autograd import bias_of, side_of
from .beside import Beside
from .block import NO_POSITIVES, Block, Side
from .dtypes import accumulation_dtype
from .line_formulas import Request


class StatisticsOptions(NamedTuple):
    """The options of one call of `contrast`, checked, with the engine chosen."""

    engine: str
    dtype: torch.dtype  # of the products
    normalize: bool
    memory_budget: int
    above: float | None  # for a kind with levels: the distance of levels above own positives
    request: Request

    def flat(self) -> tuple[Any, ...]:
        return *self[:-1], *self.request

    @classmethod
    def of(cls, flat: Sequence[Any]) -> StatisticsOptions:
        count = len(cls._fields) - 1
        return cls(*flat[:count], Request(*flat[count:]))


class StatisticsInputs(NamedTuple):
    """The tensors that have gradients."""

    x: Tensor  # (M, D)
    y: Tensor  # (N, D)
    scale: Tensor  # one element
    bias: Tensor | None  # one element
    key_bias: Tensor | None  # (N)


class Lines(NamedTuple):
    """The numbers of lines that a block does not hold."""

    occupied: Tensor | None  # as the operator `sweep` takes it
    labels: Tensor | None  # (M): the columns of the rows' own positives
    levels: Tensor | None  # (M + N), in log2 units


def block_of(
    inputs: StatisticsInputs, beside: Beside, offset: int, kind: str, options: StatisticsOptions
) -> Block:
    """The block of the inputs, without gradients. With labels, ids keep the labelled pairs out of
    the negatives."""
    with torch.no_grad():
        x, y = (side_of(t, options.dtype, options.normalize) for t in inputs[:2])
        ids, labels = beside.ids, beside.labels
        if labels is not None:
            ids = ids or (labels, torch.arange(y.features.shape[0], device=labels.device))
            offset = NO_POSITIVES
        if ids is not None:
            codes = pairs.codes_of(*ids)
            x, y = x._replace(ids=codes[0]), y._replace(ids=codes[1])
        compared = x, y
        if beside.target_x is not None:
            targets = [
                side_of(t, options.dtype, options.normalize)
                for t in (beside.target_x, beside.target_y)
            ]
            compared = targets if beside.guided else compared
            x, y = (
                side._replace(target=target.features, target_factor=target.factor)
                for side, target in zip((x, y), targets, strict=True)
            )
        limits = _limits(compared, beside, offset, options.request)
        if limits is not None:
            x, y = x._replace(threshold=limits[0]), y._replace(threshold=limits[1])
        bias, positive = bias_of(inputs.bias, kind), options.request.same_id_positive
        return Block(
            x, y, inputs.scale, bias, inputs.key_bias, beside.target_scale, offset, kind, positive,
            beside.guided,
        )  # fmt: skip


def _limits(
    compared: Sequence[Side], beside: Beside, offset: int, request: Request
) -> tuple[Tensor, Tensor] | None:
    """The thresholds of rows and of columns, for the similarities of two sides."""
    if beside.margin is not None:
        return pairs.thresholds(*compared, offset, beside.labels, beside.margin)
    if beside.limits is None:
        return None
    of_rows = beside.limits.to(accumulation_dtype(compared[0].features))
    if request.one_set:
        return of_rows, of_rows.clone()
    return of_rows, of_rows.new_full((compared[1].features.shape[0],), torch.inf)
