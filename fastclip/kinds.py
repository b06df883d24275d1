"""The kinds of statistic that a line can keep of its pairs, in PyTorch: two functions each.

A *line* is a row or a column: a feature together with all its pairs. The engine streams the pairs
and hands over, for each line, a state that remembers its negatives; the own positive stays apart.
A kind says what a pair adds to the state, and what that is worth in the gradient:

    fold(logit, shift)         what a pair adds to its line's sum
    activation(logit, shift)   the derivative of the line's statistic with respect to the logit, up
                               to a factor of the line

Logits and shifts are in log2 units, `s * log2(e)`. The statistic is the sum itself, or, for a kind
with a shift, `log(sum) + shift`: exponentials are taken relative to the shift, which keeps them
within range.

A loss that is fused to its end brings a third function, `finish`: loss, coefficient and positive's
weight of a line whose own positive has logit s. A pair's loss is half its row's plus half its
column's. Keeping positives apart loses nothing where training succeeds: `softmax - 1` cancels
there, `-R / (R + P)` does not.

`register` adds a kind. The plain PyTorch engine serves every kind; a compiled engine those that it
has the two functions of, under the same name (`csrc/epilogues.h`, `triton_kernels/epilogues.py`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)


class Kind:
    """The traits and functions of a kind; never instantiated."""

    name: str
    # Sums are of exponentials relative to a shift, and their logarithm is the statistic. A bias
    # common to all logits moves it by as much, so that the engine does not see the bias.
    has_shift = False
    # `finish` has coefficients of 1: weights are known before the sweep, which makes the loss and
    # its gradients in one go.
    is_linear = False
    # Positives by id are folded with the sign of their logits changed.
    negates_positives = False

    @classmethod
    def fold(cls, logit: Tensor, shift: Tensor) -> Tensor:
        raise NotImplementedError(f"kind {cls.name!r} must have a fold, got none")

    @classmethod
    def activation(cls, logit: Tensor, shift: Tensor) -> Tensor:
        raise NotImplementedError(f"kind {cls.name!r} must have an activation, got none")

    @classmethod
    def finish(cls, shift: Tensor, sum: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError(
            f"kind {cls.name!r} must have a finish for a fused loss, got none"
        )


class Softmax(Kind):
    """The log-sum-exp of a line's pairs. Its loss is CLIP's two-way cross-entropy (Radford et al.,
    arXiv 2103.00020)."""

    name = "softmax"
    has_shift = True

    @staticmethod
    def fold(logit: Tensor, shift: Tensor) -> Tensor:
        return torch.exp2(logit - shift)

    activation = fold

    @staticmethod
    def finish(shift: Tensor, sum: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # log(1 + R / P), in the log domain: neither R nor P needs to be representable.
        z = (torch.log2(sum) + shift) * LN2 - s
        positive = torch.exp2(s * LOG2E - shift)
        # The clamp only matters to a line without negatives whose positive underflows.
        total = (sum + positive).clamp_min(torch.finfo(sum.dtype).tiny)
        return F.softplus(z, threshold=60), total.reciprocal(), -sum / total


class Sigmoid(Kind):
    """The sum of softplus of a line's pairs. Its loss is SigLIP's (Zhai et al., arXiv
    2303.15343)."""

    name = "sigmoid"
    is_linear = True
    negates_positives = True

    @staticmethod
    def fold(logit: Tensor, shift: Tensor) -> Tensor:
        return F.softplus(logit * LN2, threshold=60)

    @staticmethod
    def activation(logit: Tensor, shift: Tensor) -> Tensor:
        return torch.sigmoid(logit * LN2)

    @staticmethod
    def finish(shift: Tensor, sum: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return sum + F.softplus(-s, threshold=60), torch.ones_like(sum), -torch.sigmoid(-s)


KINDS: dict[str, type[Kind]] = {}


def register(kind: type[Kind]) -> type[Kind]:
    """Adds a kind under its name.

    Raises:
        ValueError: another kind has that name.
    """
    if KINDS.setdefault(kind.name, kind) is not kind:
        raise ValueError(f"a kind's name must be its own, got {kind.name!r} for a second one")
    return kind


def kind_of(name: str) -> type[Kind]:
    """Raises ValueError for an unknown name."""
    if name not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {name!r}")
    return KINDS[name]


for _kind in (Softmax, Sigmoid):
    register(_kind)


class LineStatistics(NamedTuple):
    """Statistics of each line's pairs; float64 (float32 on Apple GPUs).

    rows (M), columns (N): log-sum-exp of each line's negatives, -inf without any; with
        `kind="sigmoid"` the sum of their softplus, 0 without any. None where not asked for.
    positives (M): the logit of each row's own positive; NaN for a row without.
    row_positives (M), column_positives (N): with `same_id="positive"` log-sum-exp of each line's
        positives, its own included; with `kind="sigmoid"` the sum of softplus of their negated
        logits. Else None.
    """

    rows: Tensor | None
    columns: Tensor | None
    positives: Tensor
    row_positives: Tensor | None = None
    column_positives: Tensor | None = None
