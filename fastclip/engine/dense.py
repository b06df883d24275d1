"""Dense logits and reductions in plain PyTorch, for the reference losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .tiny_norms import EPS


def dense_logits(
    x: Tensor,  # (M, D)
    y: Tensor,  # (N, D)
    scale: Tensor | float,
    bias: Tensor | float | None,
    normalize: bool,
) -> Tensor:  # (M, N)
    """`scale * x @ y.T + bias` in float32, or in float64 if either side is float64; never in a half
    dtype."""
    x, y = _in_autocast_dtype(x), _in_autocast_dtype(y)
    dtype = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        x, y = x.to(dtype), y.to(dtype)
        if normalize:
            x, y = F.normalize(x, dim=1, eps=EPS), F.normalize(y, dim=1, eps=EPS)
        logits = as_scalar(scale, x) * (x @ y.T)
        return logits if bias is None else logits + as_scalar(bias, x)


def _in_autocast_dtype(x: Tensor) -> Tensor:
    """`x` as the matmul that the loss replaces would take it; autocast leaves float64 alone."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def as_scalar(value: Tensor | float, like: Tensor) -> Tensor | float:
    """Returns a tensor of one element as a 0-dim tensor of `like`'s dtype, so that a product with
    it keeps the shape and the dtype of `like`."""
    return value.to(like).reshape(()) if isinstance(value, Tensor) else value


def reduce_lines(
    losses: Tensor, reduction: str, weights: Tensor | None, counts: Tensor | None = None
) -> Tensor:
    """The losses of lines (N) times their weights, their sum, or the weighted mean over the lines
    that count; 0 if no line counts.

    Args:
        weights: (N); None: all 1.
        counts: bool (N), the lines that count; None: all.

    Raises:
        ValueError: an unknown reduction.
    """
    factors = torch.ones_like(losses) if weights is None else weights.to(losses.dtype)
    if counts is not None:
        factors = factors * counts
    losses = losses * factors
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if reduction == "mean":
        number = factors.sum()
        return losses.sum() / torch.where(number == 0, 1, number)
    raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
