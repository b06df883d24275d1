"""A loss of a large batch and its gradients in float64, a few rows of logits at a time.

It serves batches whose dense logits would not fit: those of 12,345 pairs take about 1 GB. The
positives' weights are `softmax - 1`, which cancels on learnt pairs, so use it only for features
whose positives do not stand out. It uses plain torch on any device, and no engine.
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
    """Both towers, normalised if the loss does so, and the number of rows to multiply at a time."""

    x: Tensor
    y: Tensor
    scale: Tensor
    bias: Tensor
    rows: int

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Yields rows, their products and logits with all columns, and their mask of positives."""
        columns = torch.arange(len(self.y), device=self.y.device)
        for start in range(0, len(self.x), self.rows):
            part = slice(start, min(start + self.rows, len(self.x)))
            t = self.x[part] @ self.y.T
            yield part, t, self.scale * t + self.bias, columns[part, None] == columns


class Chunk(NamedTuple):
    """The contribution of some rows of logits to the mean loss and its gradients."""

    part: slice
    t: Tensor  # their products
    weights: Tensor  # dL/ds
    value: Tensor
    dbias: Tensor


def _clip(batch: Batch) -> Iterator[Chunk]:
    rows = torch.empty_like(batch.x[:, 0])
    columns = torch.full_like(rows, -torch.inf)
    for part, _, s, _ in batch.chunks():
        rows[part] = s.logsumexp(1)
        columns = torch.logaddexp(columns, s.logsumexp(0))
    for part, t, s, positive in batch.chunks():
        w = (torch.exp(s - rows[part, None]) + torch.exp(s - columns)) / 2 - positive.double()
        value = (rows[part] + columns[part]).sum() / 2 - s[positive].sum()
        # A bias shifts all logits of a row alike, which does not change the softmax.
        yield Chunk(part, t, w / len(rows), value / len(rows), torch.zeros_like(value))


def _siglip(batch: Batch) -> Iterator[Chunk]:
    n = len(batch.x)
    for part, t, s, positive in batch.chunks():
        w = (torch.sigmoid(s) - positive.double()) / n
        value = (F.softplus(s, threshold=60).sum() - s[positive].sum()) / n
        yield Chunk(part, t, w, value, w.sum())


CHUNKS = {"clip": _clip, "siglip": _siglip}


def truth(
    loss: str,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    normalize: bool = False,
    rows: int = 1024,
) -> Truth:
    """Returns the mean loss of a square batch, by its name in CHUNKS, and its gradients."""
    x, y = (t.detach().double().requires_grad_() for t in (x, y))
    units = [F.normalize(t, dim=1) if normalize else t for t in (x, y)]
    numbers = [t.detach().double().reshape(()) for t in (scale, bias)]
    batch = Batch(*(t.detach() for t in units), *numbers, rows)
    value, dscale, dbias = (torch.zeros_like(batch.scale) for _ in range(3))
    gradients = [torch.zeros_like(t) for t in batch[:2]]
    for chunk in CHUNKS[loss](batch):
        w = chunk.weights
        gradients[0][chunk.part] = batch.scale * (w @ batch.y)
        gradients[1] += batch.scale * (w.T @ batch.x[chunk.part])
        value += chunk.value
        dscale += (w * chunk.t).sum()
        dbias += chunk.dbias
    if normalize:
        gradients = torch.autograd.grad(units, (x, y), gradients)
    return Truth(value, *gradients, dscale, dbias)
