"""Losses of ranks whose scales and biases differ, and their dense form, for `test_drift.py`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip import distributed
from fastclip.engine import warn_once

WIDTH = 6


class Drift(NamedTuple):
    """A loss, each rank's number of pairs, scale and bias."""

    loss: str  # a key of `OURS` and `DENSE`
    sizes: tuple[int, ...]
    scales: tuple[float, ...]
    ring: bool = False

    @property
    def biases(self) -> list[float]:
        return [0.5 - k for k in range(len(self.sizes))]

    def rows(self, rank: int) -> slice:
        return slice(sum(self.sizes[:rank]), sum(self.sizes[: rank + 1]))


def batch(drift: Drift) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, y, key_bias and ids of all ranks."""
    n, generator = sum(drift.sizes), torch.Generator().manual_seed(0)
    x, y = F.normalize(torch.randn(2, n, WIDTH, generator=generator, dtype=torch.float64), dim=-1)
    key_bias = torch.randn(n, generator=generator, dtype=torch.float64)
    return x, y, key_bias, torch.arange(n) // 3


def used(found: list[Tensor]) -> Tensor:
    """A number from statistics of lines, in which each has a weight of its own."""
    return sum((torch.tanh(t / 7) * (k + 1)).sum() for k, t in enumerate(found))


def by_id(x: Tensor, y: Tensor, scale: Tensor, _: Tensor, key_bias: Tensor, ids: Tensor,
          **options: Any) -> Tensor:  # fmt: skip
    c = distributed.contrast(
        x, y, scale, ids=(ids, ids), same_id="positive", key_bias=key_bias, **options
    )
    return used([c.rows, c.columns, c.positives, c.row_positives, c.column_positives])


def sigmoid(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, *_: Tensor, **options: Any):
    c = distributed.contrast(x, y, scale, bias, kind="sigmoid", **options)
    return used([c.rows, c.columns, c.positives])


OURS: dict[str, Callable[..., Tensor]] = {
    "clip": lambda x, y, scale, bias, *_, **o: distributed.clip_loss(x, y, scale, bias, **o),
    "siglip": lambda x, y, scale, bias, *_, **o: distributed.siglip_loss(x, y, scale, bias, **o),
    "contrast": by_id,
    "contrast, sigmoid": sigmoid,
}


def _clip(s: Tensor, own: slice, _: Any) -> Tensor:
    shares = (-s.log_softmax(1).diagonal() - s.log_softmax(0).diagonal()) / 2
    return shares[own].sum() / len(s)


def _siglip(s: Tensor, own: slice, _: Any) -> Tensor:
    signs = 2 * torch.eye(len(s), dtype=s.dtype) - 1
    return F.softplus(-signs * s)[own].sum() / len(s)


def _by_id(s: Tensor, own: slice, ids: Tensor) -> Tensor:
    same = ids[:, None] == ids
    negatives, positives = s.masked_fill(same, -torch.inf), s.masked_fill(~same, -torch.inf)
    return used([
        negatives.logsumexp(1)[own], negatives.logsumexp(0)[own], s.diagonal()[own],
        positives.logsumexp(1)[own], positives.logsumexp(0)[own],
    ])  # fmt: skip


def _sigmoid(s: Tensor, own: slice, _: Any) -> Tensor:
    negatives = F.softplus(s).masked_fill(torch.eye(len(s), dtype=torch.bool), 0)
    return used([negatives.sum(1)[own], negatives.sum(0)[own], s.diagonal()[own]])


DENSE = {"clip": _clip, "siglip": _siglip, "contrast": _by_id, "contrast, sigmoid": _sigmoid}


def dense(drift: Drift) -> list[tuple[float, list[Tensor]]]:
    """Each rank's value, and the gradients of the sum of the values: the logits of a row have the
    scale and the bias of the row's rank."""
    x, y, key_bias, ids = batch(drift)
    leaves = [x, y, key_bias]
    leaves += [torch.tensor(of, dtype=x.dtype) for of in (drift.scales, drift.biases)]
    x, y, key_bias, scales, biases = (t.requires_grad_() for t in leaves)
    of_row = torch.tensor([rank for rank, size in enumerate(drift.sizes) for _ in range(size)])
    s = scales[of_row, None] * (x @ y.T)
    if drift.loss == "contrast":
        s = s + key_bias
    elif drift.loss != "clip":
        s = s + biases[of_row, None]
    ranks = range(len(drift.sizes))
    factor = 1 if "contrast" in drift.loss else len(ranks)
    values = [factor * DENSE[drift.loss](s, drift.rows(rank), ids) for rank in ranks]
    found = torch.autograd.grad(
        sum(values), (x, y, scales, biases, key_bias), allow_unused=True, materialize_grads=True
    )
    return [
        (
            values[rank].item(),
            [t[drift.rows(rank)] if len(t) == len(x) else t[rank] for t in found],
        )
        for rank in ranks
    ]


def ours(rank: int, world_size: int, drifts: list[Drift]) -> list[tuple[float, list[Tensor]]]:
    """This rank's value and gradients of each case."""
    results = []
    for drift in drifts:
        own = drift.rows(rank)
        x, y, key_bias, ids = (t[own].clone() for t in batch(drift))
        scalars = (torch.tensor(of[rank], dtype=x.dtype) for of in (drift.scales, drift.biases))
        x, y, scale, bias, key_bias = leaves = [
            t.requires_grad_() for t in (x, y, *scalars, key_bias)
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = OURS[drift.loss](
                x, y, scale, bias, key_bias, ids, ring=drift.ring,
                uneven=len(set(drift.sizes)) > 1,
            )  # fmt: skip
        found = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        results.append((value.item(), list(found)))
    return results


def warned(rank: int, world_size: int, differ: bool, as_numbers: bool) -> list[str]:
    """The warnings of two calls of two losses, in a process that has had none; each with its
    file."""
    warn_once._given.clear()
    x, y = torch.randn(2, 3, WIDTH)
    scalars = [torch.tensor(t + 15.0 * differ * rank) for t in (5.0, -2.0)]
    if as_numbers:
        scalars = [t.item() for t in scalars]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):
            distributed.siglip_loss(x, y, *scalars)
            distributed.contrast(x, y, *scalars)
    return [f"{warning.filename}: {warning.message}" for warning in found]
