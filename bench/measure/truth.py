"""Loss and gradients in float64, in blocks of rows, with positives separate from negatives.

For well separated pairs, log-sum-exp minus the positive, and softmax minus one, cancel completely:
in float64 below a loss of 1e-16. Here a row's loss is `softplus(negatives' log-sum-exp - positive)`
and the weight of its positive is `-sigmoid` of the same, so nothing cancels. Only torch's matmul,
exponential and logarithm are used: no autograd, and no code of fastclip.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_ROWS = 512


@dataclass
class Truth:
    """The mean loss over the M pairs and its gradients, in float64; `dbias` if there is a bias."""

    loss: Tensor
    dx: Tensor  # (M, D)
    dy: Tensor  # (N, D)
    dscale: Tensor
    dbias: Tensor | None = None


def _blocks(x: Tensor, y: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields (first row, rows of x, their products with y), O(BLOCK_ROWS * N) at a time."""
    return (
        (first, x[first : first + BLOCK_ROWS], x[first : first + BLOCK_ROWS] @ y.T)
        for first in range(0, len(x), BLOCK_ROWS)
    )


def clip(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None) -> Truth:
    """CLIP's loss of x (M, D) and y (N, D), N >= M, not normalised here. The positive of row i is
    column i; columns from M on have no loss of their own. The bias cancels."""
    x, y, scale = (t.detach().double() for t in (x, y, scale))
    m = len(x)
    t = (x * y[:m]).sum(dim=1)
    rows, columns = torch.empty_like(t), torch.full_like(t, -torch.inf)
    for first, x_block, products in _blocks(x, y):
        last = first + len(x_block)
        s = scale * products
        s.diagonal(first).fill_(-torch.inf)
        rows[first:last] = s.logsumexp(dim=1)
        columns = torch.logaddexp(columns, s[:, :m].logsumexp(dim=0))

    positive, zero = scale * t, torch.zeros_like(t)
    # softplus as logaddexp: F.softplus becomes linear at 20, 2e-9 too early for a float64 truth.
    total = (
        torch.logaddexp(zero, rows - positive) + torch.logaddexp(zero, columns - positive)
    ).sum()
    p = -torch.sigmoid(rows - positive) - torch.sigmoid(columns - positive)
    rows, columns = torch.logaddexp(rows, positive), torch.logaddexp(columns, positive)

    dx, dy = torch.empty_like(x), torch.zeros_like(y)
    dy[:m] = p[:, None] * x
    dscale = (p * t).sum()
    for first, x_block, products in _blocks(x, y):
        last = first + len(x_block)
        s = scale * products
        w = torch.exp(s - rows[first:last, None])
        w[:, :m] += torch.exp(s[:, :m] - columns)
        w.diagonal(first).zero_()
        dx[first:last] = w @ y + p[first:last, None] * y[first:last]
        dy += w.T @ x_block
        dscale = dscale + (w * products).sum()
    return Truth(total / (2 * m), dx * scale / (2 * m), dy * scale / (2 * m), dscale / (2 * m))


def siglip(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Truth:
    """SigLIP's loss, with the same arguments."""
    x, y, scale, bias = (t.detach().double() for t in (x, y, scale, bias))
    m = len(x)
    total = dscale = dbias = torch.zeros_like(scale)
    dx, dy = torch.empty_like(x), torch.zeros_like(y)
    for first, x_block, products in _blocks(x, y):
        sign = torch.ones_like(products)
        sign.diagonal(first).fill_(-1)
        signed = sign * (scale * products + bias)
        total = total + torch.logaddexp(torch.zeros_like(signed), signed).sum()
        w = sign * torch.sigmoid(signed)
        dx[first : first + len(x_block)] = w @ y
        dy += w.T @ x_block
        dscale = dscale + (w * products).sum()
        dbias = dbias + w.sum()
    return Truth(total / m, dx * scale / m, dy * scale / m, dscale / m, dbias / m)


def relative_error(value: Tensor, true: Tensor) -> float:
    """`|value - true| / |true|` (2-norms); the absolute error if `true` is zero."""
    true = true.to(value.device)
    error, size = (value.detach().double() - true).norm(), true.norm()
    return float(error if size == 0 else error / size)
