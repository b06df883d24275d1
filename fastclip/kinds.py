"""The kinds of statistic of a row or column, in PyTorch; `register` adds your own.

A *line* is a row or a column of the matrix of logits: a feature with all its pairs. The engine
streams the pairs and returns, for each line, a state of its negatives; own positives stay apart. A
kind is two functions of a pair's logit:

    fold(logit, shift)         the pair's term in its line's sum
    activation(logit, shift)   the derivative of the line's statistic with respect to the logit, up
                               to a factor of the line

Logits and shifts are in log2 units, `s * log2(e)`. The statistic is the sum itself or, for a kind
with a shift, `log(sum) + shift`: exponentials are relative to the shift, which keeps them within
range. A kind with levels has no shift: the caller gives each line a level, which takes its place,
and the statistic is a sum over the pairs above that level.

A fused loss, such as `clip_loss`, needs a third function of its kind, `finish`. For a line whose
own positive has logit s, in natural units, it returns the loss, the coefficient of the line and the
weight of the positive. The loss of a pair is half its row's plus half its column's. Positives stay
apart for accuracy: when training succeeds `softmax - 1` cancels, `-R / (R + P)` does not. R is the
sum of the negatives' exponentials, P the exponential of the positive.

The plain PyTorch engine serves every kind. A compiled engine serves those whose two functions it
has under the same name (`csrc/kinds.h`, `triton_kernels/kinds.py`).
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
    """The traits and functions of a kind. It is never instantiated."""

    name: str
    # True: the sums are of exponentials relative to a shift, and the statistic is their logarithm.
    # A bias that is common to all logits is added to the statistic at the end, so the engine does
    # not get the bias.
    has_shift = False
    # True: `finish` returns coefficients of 1, so weights are known before the sweep, and one sweep
    # makes the loss and its gradients.
    is_linear = False
    # True: positives by id are folded with negated logits. Only for a kind without a shift.
    negates_positives = False
    # True: the caller gives a level for each line, in log2 units. Activations are 1 or 0, and their
    # sum, the number of a line's pairs above its level, is in the state: the derivative of the
    # line's sum with respect to its level is minus that. Such a kind has no positives by id.
    has_levels = False

    @classmethod
    def is_relative(cls) -> bool:
        """True if fold and activation read their second argument, a number of the line."""
        return cls.has_shift or cls.has_levels

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
        # log(1 + R / P) in the log domain: neither R nor P needs to be representable.
        z = (torch.log2(sum) + shift) * LN2 - s
        positive = torch.exp2(s * LOG2E - shift)
        # The clamp only matters for a line without negatives whose positive underflows.
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


class Hinge(Kind):
    """The sum of how far a line's pairs lie above its level. Ranking losses (VSE++, Faghri et al.,
    arXiv 1707.05612) sum it over negatives; the level is the own positive's logit minus a
    margin."""

    name = "hinge"
    has_levels = True

    @staticmethod
    def fold(logit: Tensor, level: Tensor) -> Tensor:
        return F.relu(logit - level) * LN2

    @staticmethod
    def activation(logit: Tensor, level: Tensor) -> Tensor:
        # A NaN is neither above nor below, and stays NaN.
        above = logit - level
        return torch.where(above.isnan(), above, above > 0)


KINDS: dict[str, type[Kind]] = {}


def register(kind: type[Kind]) -> type[Kind]:
    """Adds a kind under its name and returns the kind, so that it can be a decorator.

    Raises:
        ValueError: another kind has that name; a kind with a shift that negates positives; a kind
            with levels that has a shift, negates positives or is linear.
    """
    if kind.has_shift and kind.negates_positives:
        # Engines find the shifts of lines by their largest logits, without a sign.
        raise ValueError(f"a kind with a shift must not negate positives, got {kind.name!r}")
    for trait in ("has_shift", "negates_positives", "is_linear"):
        if kind.has_levels and getattr(kind, trait):
            raise ValueError(
                f"a kind with levels must have {trait} = False, got True for {kind.name!r}"
            )
    if KINDS.setdefault(kind.name, kind) is not kind:
        raise ValueError(f"a kind's name must be its own, got {kind.name!r} for a second one")
    return kind


def kind_of(name: str) -> type[Kind]:
    """Returns the kind of a name; raises ValueError for an unknown one."""
    if name not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {name!r}")
    return KINDS[name]


for _kind in (Softmax, Sigmoid, Hinge):
    register(_kind)


class LineStatistics(NamedTuple):
    """Statistics of each row's and each column's pairs; float64 (float32 on Apple GPUs).

    rows (M), columns (N): the log-sum-exp of each line's negatives, -inf without any; with
        `kind="sigmoid"` the sum of their softplus, with `kind="hinge"` of their hinges, 0 without
        any. None if not wanted.
    positives (M): the logit of each row's own positive; NaN for a row without one. None for a
        block of one set of features against itself.
    row_positives (M), column_positives (N): with `same_id="positive"` the log-sum-exp of each
        line's positives, the own one included; with `kind="sigmoid"` the sum of softplus of their
        negated logits. Otherwise None.
    row_means (M), column_means (N): with `means=True` the mean logit of each line's pairs: its
        negatives, its own positive and its positives by id. Otherwise None.
    row_positive_means (M), column_positive_means (N): with `means=True` and `same_id="positive"`
        the mean logit of each line's positives; NaN for a line without any. Otherwise None.
    row_expectations (M), column_expectations (N): with `targets`, the expectation of each line's
        logits under the softmax of the teacher's. Otherwise None.
    """

    rows: Tensor | None
    columns: Tensor | None
    positives: Tensor | None
    row_positives: Tensor | None = None
    column_positives: Tensor | None = None
    row_means: Tensor | None = None
    column_means: Tensor | None = None
    row_positive_means: Tensor | None = None
    column_positive_means: Tensor | None = None
    row_expectations: Tensor | None = None
    column_expectations: Tensor | None = None
