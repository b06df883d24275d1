"""Positive and negative pairs of labels, without the matrix of all pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Pairs(NamedTuple):
    """Pairs of M labels with N others, or of different entries of one set of labels.

    classes (M), other_classes (N): the numbers of labels, from 0. counts: the number of entries of
    each class among the others. positives, negatives: the number of pairs.
    """

    classes: Tensor
    other_classes: Tensor
    counts: Tensor
    one_set: bool
    positives: int
    negatives: int

    @classmethod
    def of(cls, labels: Tensor, others: Tensor | None) -> Pairs:
        """others: None for one set."""
        m, one_set = len(labels), others is None
        both = labels if one_set else torch.cat((labels, others))
        _, classes = torch.unique(both, return_inverse=True)
        first, second = classes[:m], classes if one_set else classes[m:]
        counts = torch.bincount(second, minlength=int(classes.max()) + 1)
        same = int(counts[first].sum())
        return cls(
            first, second, counts, one_set, same - m * one_set, m * len(second) - same
        )  # fmt: skip

    @property
    def are_missing(self) -> bool:
        """True if the host's losses are 0: no positives, no negatives, or at most one of both."""
        return not (self.positives and self.negatives) or self.positives + self.negatives <= 2

    def indices(self) -> tuple[Tensor, Tensor]:
        """The positive pairs (P), (P), in the order of the rows of a matrix."""
        number = self.counts[self.classes]
        lines = torch.arange(len(number), device=number.device).repeat_interleave(number)
        within = torch.arange(len(lines), device=number.device) - (number.cumsum(0) - number)[lines]
        by_class = self.other_classes.argsort(stable=True)
        starts = self.counts.cumsum(0) - self.counts
        others = by_class[starts[self.classes][lines] + within]
        if not self.one_set:
            return lines, others
        kept = lines != others
        return lines[kept], others[kept]
