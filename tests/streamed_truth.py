"""A loss of a large batch and its gradients in float64, a few rows of logits at a time.

For batches whose dense logits would not fit: 12,345 pairs take about 1 GB. The positives' weights
are `softmax - 1`, which cancels on learnt pairs, so this serves features whose positives do not
stand out. Plain torch on any device, nothing of an engine.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Truth(NamedTuple):
    value: Tensor
    dx: Tensor
    dy: Tensor
    dscale: Tensor
    dbias: Tensor


class Batch(NamedTuple):
    """Towers as the logits take them, `rows` of which are multiplied at a time."""

    x: Tensor
    y: Tensor
    scale: Tensor
    bias: Tensor
    rows: int

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Rows, their products and logits with all columns, and a mask of the positives."""
        columns = torch.arange(len(self.y), device=self.y.device)
        for start in range(0, len(self.x), self.rows):
            part = slice(start, min(start + self.rows, len(self.x)))
            t = self.x[part] @ self.y.T
            yield part, t, self.scale * t + self.bias, columns[part, None] == columns


def _clip(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The mean loss, and the logarithms of each row's and each column's sum."""
    n = len(batch.x)
    rows, positives = torch.empty_like(batch.x[:, 0]), torch.zeros_like(batch.scale)
    columns = torch.full_like(rows, -torch.inf)
    for part, _, s, positive in batch.chunks():
        rows[part] = s.logsumexp(1)
        columns = torch.logaddexp(columns, s.logsumexp(0))
        positives += s[positive].sum()
    return ((rows.sum() + columns.sum()) / 2 - positives) / n, rows, columns


def truth(
    loss: str,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    normalize: bool = False,
    rows: int = 1024,
) -> Truth:
    """The mean loss, "clip" or "siglip", of a square batch, and its gradients."""
    x, y = (t.detach().double().requires_grad_() for t in (x, y))
    units = [F.normalize(t, dim=1) if normalize else t for t in (x, y)]
    n = len(x)
    numbers = [t.detach().double().reshape(()) for t in (scale, bias)]
    batch = Batch(*(t.detach() for t in units), *numbers, rows)
    value, dscale, dbias = (torch.zeros_like(batch.scale) for _ in range(3))
    gradients = [torch.zeros_like(t) for t in batch[:2]]
    if loss == "clip":
        value, row_sums, column_sums = _clip(batch)
    for part, t, s, positive in batch.chunks():
        if loss == "clip":
            w = (torch.exp(s - row_sums[part, None]) + torch.exp(s - column_sums)) / 2
        else:
            value += (F.softplus(s, threshold=60).sum() - s[positive].sum()) / n
            w = torch.sigmoid(s)
        w = (w - positive.double()) / n
        gradients[0][part] = batch.scale * (w @ batch.y)
        gradients[1] += batch.scale * (w.T @ batch.x[part])
        dscale += (w * t).sum()
        # A bias moves a row's logits alike: softmax does not see it.
        dbias += w.sum() if loss == "siglip" else 0
    if normalize:
        gradients = torch.autograd.grad(units, (x, y), gradients)
    return Truth(value, *gradients, dscale, dbias)
