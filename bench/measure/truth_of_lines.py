"""Losses of lines in float64, in blocks of rows: the truths of the family.

A loss is a sum of terms. A term is a function of a block of rows, which sees all columns, so that a
block needs O(BLOCK_ROWS * N). Its gradients are autograd's. Positives are apart from negatives, as
in `truth.py`. No code of fastclip is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import truth
from .truth import Truth

MARGIN = 0.2  # fastclip's default

# Takes the features of a block of rows, those of all columns, the scale and the block's rows.
Term = Callable[[Tensor, Tensor, "Tensor | None", slice], Tensor]


def _truth(
    terms: Sequence[tuple[Term, bool]], x: Tensor, y: Tensor | None, scale: Tensor | None,
    count: float,
) -> Truth:  # fmt: skip
    """The sum of the terms over all rows of x (of y if a term's flag is True), divided by count.
    y=None: x against itself."""
    x, y, scale = (
        None if t is None else t.detach().double().requires_grad_() for t in (x, y, scale)
    )
    leaves = [leaf for leaf in (x, y, scale) if leaf is not None]
    total = x.new_zeros(())
    gradients = [torch.zeros_like(leaf) for leaf in leaves]
    for term, swapped in terms:
        a, b = (y, x) if swapped else (x, x if y is None else y)
        for first in range(0, len(a), truth.BLOCK_ROWS):
            rows = slice(first, min(first + truth.BLOCK_ROWS, len(a)))
            part = term(a[rows], b, scale, rows) / count
            total += part.detach()
            for gradient, found in zip(gradients, torch.autograd.grad(part, leaves), strict=True):
                gradient += found
    found = iter(gradients)
    dx, dy, dscale = (None if leaf is None else next(found) for leaf in (x, y, scale))
    return Truth(total, dx, dy, dscale)


def _own(a: Tensor, b: Tensor, rows: slice) -> Tensor:
    """True where a column is the row's own."""
    return torch.arange(rows.start, rows.stop, device=a.device)[:, None] == torch.arange(
        len(b), device=a.device
    )


def _cross_entropies(logits: Tensor, positive: Tensor, left_out: Tensor) -> Tensor:
    """The sum over rows; a row has one positive."""
    negatives = logits.masked_fill(positive | left_out, -torch.inf).logsumexp(1)
    gap = negatives - logits[positive]
    return torch.logaddexp(torch.zeros_like(gap), gap).sum()


def info_nce(x: Tensor, y: Tensor, scale: Tensor) -> Truth:
    """InfoNCE of the rows."""

    def term(a: Tensor, b: Tensor, scale: Tensor, rows: slice) -> Tensor:
        own = _own(a, b, rows)
        return _cross_entropies(scale * (a @ b.T), own, torch.zeros_like(own))

    return _truth([(term, False)], x, y, scale, len(x))


def clip_ids(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, ids: Tensor) -> Truth:
    """CLIP's loss without other pairs that have equal ids."""

    def term(a: Tensor, b: Tensor, scale: Tensor, rows: slice) -> Tensor:
        own = _own(a, b, rows)
        return _cross_entropies(scale * (a @ b.T), own, (ids[rows, None] == ids) & ~own)

    return _truth([(term, False), (term, True)], x, y, scale, 2 * len(x))


def supcon(x: Tensor, labels: Tensor, scale: Tensor) -> Truth:
    """The mean over the rows that have positives."""
    counts = (labels[:, None] == labels).sum(1) > 1

    def term(a: Tensor, b: Tensor, scale: Tensor, rows: slice) -> Tensor:
        logits, own = scale * (a @ b.T), _own(a, b, rows)
        positives = (labels[rows, None] == labels) & ~own
        mean = (logits * positives).sum(1) / positives.sum(1).clamp_min(1)
        losses = logits.masked_fill(own, -torch.inf).logsumexp(1) - mean
        return losses[counts[rows]].sum()

    return _truth([(term, False)], x, None, scale, float(counts.sum()))


def ranking(x: Tensor, y: Tensor) -> Truth:
    """The sum of the hinges of all negatives, both ways."""
    return _ranking(x, y, lambda hinges: hinges.sum(1))


def ranking_hardest(x: Tensor, y: Tensor) -> Truth:
    """The largest hinge of the negatives, both ways."""
    return _ranking(x, y, lambda hinges: hinges.max(1).values)


def _ranking(x: Tensor, y: Tensor, of_row: Callable[[Tensor], Tensor]) -> Truth:
    def term(a: Tensor, b: Tensor, scale: None, rows: slice) -> Tensor:
        t, own = a @ b.T, _own(a, b, rows)
        hinges = F.relu(MARGIN + t - t[own][:, None])
        return of_row(hinges.masked_fill(own, 0)).sum()

    return _truth([(term, False), (term, True)], x, y, None, len(x))


def nt_xent(x: Tensor, y: Tensor, scale: Tensor) -> Truth:
    """SimCLR's loss of the 2N views; the positive of view i is view i + N."""

    def term(a: Tensor, b: Tensor, scale: Tensor, rows: slice) -> Tensor:
        own = _own(a, b, rows)
        positive = own.roll(len(x), 1)
        return _cross_entropies(scale * (a @ b.T), positive, own)

    found = _truth([(term, False)], torch.cat((x, y)), None, scale, 2 * len(x))
    dx, dy = found.dx.split(len(x))
    return Truth(found.loss, dx, dy, found.dscale)


def distill(
    x: Tensor, y: Tensor, scale: Tensor, teacher_x: Tensor, teacher_y: Tensor, teacher_scale: Tensor
) -> Truth:
    """The cross-entropy with a teacher's softmax, both ways."""
    teacher_x, teacher_y, teacher_scale = (
        t.detach().double() for t in (teacher_x, teacher_y, teacher_scale)
    )

    def against(own: Tensor, other: Tensor) -> Term:
        def term(a: Tensor, b: Tensor, scale: Tensor, rows: slice) -> Tensor:
            targets = (teacher_scale * (own[rows] @ other.T)).softmax(1)
            return -(targets * (scale * (a @ b.T)).log_softmax(1)).sum()

        return term

    terms = [(against(teacher_x, teacher_y), False), (against(teacher_y, teacher_x), True)]
    return _truth(terms, x, y, scale, 2 * len(x))
