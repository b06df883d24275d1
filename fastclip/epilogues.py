"""Every loss once, in PyTorch: its tile functions and its O(M + N) finish.

A *line* is a row or a column: a feature together with all its pairs. The engine streams the pairs
and hands over, for each line, a state that remembers its negatives; the positive stays apart. Each
loss is then three small functions:

    fold(logit, m)               what a negative adds to its line's sum
    activation(logit, m)         its weight dL/ds, up to the factor (a_i + b_j)
    finish(reference, sum, s)    loss, coefficient and positive's weight of a line whose positive
                                 has logit s

Here logits are in log2 units, `s * log2(e)`, as is `m`, the line's reference. A pair's loss is half
its row's plus half its column's, so its weight is half the sum of theirs. Keeping positives apart
loses nothing where training succeeds: `softmax - 1` cancels there, `-R / (R + P)` does not.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)


class Softmax:
    """CLIP's two-way cross-entropy (Radford et al., arXiv 2103.00020)."""

    name = "softmax"
    # Weights depend on the finished state: the gradient needs a second sweep.
    needs_state = True
    # A bias shifts all logits of a line alike and cancels.
    uses_bias = False

    @staticmethod
    def fold(logit: Tensor, m: Tensor) -> Tensor:
        return torch.exp2(logit - m)

    activation = fold

    @staticmethod
    def finish(reference: Tensor, sum: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # log(1 + R / P), in the log domain: neither R nor P needs to be representable.
        z = (torch.log2(sum) + reference) * LN2 - s
        positive = torch.exp2(s * LOG2E - reference)
        # The clamp only matters to a line without negatives whose positive underflows.
        total = (sum + positive).clamp_min(torch.finfo(sum.dtype).tiny)
        return F.softplus(z, threshold=60), total.reciprocal(), -sum / total


class Sigmoid:
    """SigLIP's pairwise sigmoid loss (Zhai et al., arXiv 2303.15343)."""

    name = "sigmoid"
    needs_state = False
    uses_bias = True

    @staticmethod
    def fold(logit: Tensor, m: Tensor) -> Tensor:
        return F.softplus(logit * LN2, threshold=60)

    @staticmethod
    def activation(logit: Tensor, m: Tensor) -> Tensor:
        return torch.sigmoid(logit * LN2)

    @staticmethod
    def finish(reference: Tensor, sum: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return sum + F.softplus(-s, threshold=60), torch.ones_like(sum), -torch.sigmoid(-s)


EPILOGUES = {epilogue.name: epilogue for epilogue in (Softmax, Sigmoid)}
