"""A rectangular block of logits for tests of the operators, and the dense form of each kind.

`make_block` makes a random block. `dense_truth.Dense` computes from the operators' formulas what
they must return for it.

Letters: `x (M, D)`, `y (N, D)`, `t_ij = <x_i, y_j> factor_x_i factor_y_j`, logits
`s_ij = scale t_ij + bias + key_bias_j`; the own positive of row i is column i + offset.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOG2E = math.log2(math.e)
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class DenseKind(NamedTuple):
    """The formulas of a kind of statistic, on logits in float64."""

    # A line's statistic over its logits in a mask, in the units of `dense_truth.logarithms`. In a
    # kind with levels these are already subtracted from the logits.
    statistic: Callable[[Tensor, Tensor, int], Tensor]
    # The weight of a logit, given a line's shift, or level, in log2 units.
    activation: Callable[[Tensor, Tensor], Tensor]
    # The statistic in the same units, from a state's shift and sum.
    logarithm: Callable[[Tensor, Tensor], Tensor]
    has_shift: bool  # then bias cancels, and errors of a statistic are absolute
    is_linear: bool  # its weights need no state: one operator sweeps and weighs
    sign_of_positives: int  # by id: the sign of their logits and weights
    has_levels: bool = False


def _softplus_sum(s: Tensor, mask: Tensor, dim: int) -> Tensor:
    return F.softplus(s, threshold=60).masked_fill(~mask, 0).sum(dim)


DENSE_KINDS = {
    "softmax": DenseKind(
        lambda s, mask, dim: s.masked_fill(~mask, -torch.inf).logsumexp(dim) * LOG2E,
        lambda s, shift: torch.exp2(s * LOG2E - shift),
        lambda shift, sums: torch.log2(sums) + shift,
        has_shift=True,
        is_linear=False,
        sign_of_positives=1,
    ),
    "sigmoid": DenseKind(
        _softplus_sum,
        lambda s, shift: torch.sigmoid(s),
        lambda shift, sums: sums,
        has_shift=False,
        is_linear=True,
        sign_of_positives=-1,
    ),
    "hinge": DenseKind(
        lambda s, mask, dim: F.relu(s).masked_fill(~mask, 0).sum(dim),
        lambda s, level: (s * LOG2E > level).double(),
        lambda counts, sums: sums,
        has_shift=False,
        is_linear=False,
        sign_of_positives=1,
        has_levels=True,
    ),
}
KINDS = tuple(DENSE_KINDS)
# The kinds of fused losses.
FINISHED = tuple(name for name, kind in DENSE_KINDS.items() if not kind.has_levels)


class Block(NamedTuple):
    """The arguments of an operator that describe a block."""

    x: Tensor  # (M, D)
    y: Tensor  # (N, D)
    factor_x: Tensor | None  # (M)
    factor_y: Tensor | None  # (N)
    scale: Tensor
    bias: Tensor | None
    offset: int
    kind: str
    ids_x: Tensor | None = None  # (M)
    ids_y: Tensor | None = None  # (N)
    threshold_x: Tensor | None = None  # (M)
    threshold_y: Tensor | None = None  # (N)
    key_bias: Tensor | None = None  # (N)
    same_id_positive: bool = False
    target_x: Tensor | None = None  # (M, D'): of a guide or a teacher
    target_y: Tensor | None = None  # (N, D')
    target_factor_x: Tensor | None = None  # (M)
    target_factor_y: Tensor | None = None  # (N)
    target_scale: Tensor | None = None  # of a teacher
    guided: bool = False

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments in the order of the schemas."""
        return (
            self.x, self.factor_x, self.ids_x, self.threshold_x, self.target_x,
            self.target_factor_x, self.y, self.factor_y, self.ids_y, self.threshold_y,
            self.target_y, self.target_factor_y, self.scale, self.bias, self.key_bias,
            self.target_scale, self.offset, self.kind, self.same_id_positive, self.guided,
        )  # fmt: skip


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of logits and accumulated gradients for features of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def factor_of(features: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(features.double(), dim=1).clamp_min(1e-12)
    return norm.reciprocal().to(accumulator(features.dtype))


def make_block(
    m: int,
    n: int,
    d: int,
    dtype: torch.dtype = torch.float32,
    *,
    kind: str = "softmax",
    offset: int = 0,
    factors: tuple[bool, bool] = (False, False),
    scale: float = 14.3,
    bias: float | None = -3.0,
    seed: int = 0,
) -> Block:
    """Returns a block on the default device: unit features, or of any length with a factor.

    Positives stand out, so that mistaking one for a negative would change all results of its lines.
    """
    x, y = (random_tensor(k, d, seed=seed + k) for k in (m, n))
    first = max(0, -offset)
    i = torch.arange(first, max(first, min(m, n - offset)))
    y[i + offset] = x[i] + 0.3 * y[i + offset]
    x, y = (
        (F.normalize(t) * (10 ** (random_tensor(len(t), 1, seed=seed) / 3) if raw else 1)).to(dtype)
        for t, raw in zip((x, y), factors, strict=True)
    )
    return Block(
        x,
        y,
        factor_of(x) if factors[0] else None,
        factor_of(y) if factors[1] else None,
        torch.tensor(scale, dtype=torch.float64),
        None if bias is None else torch.tensor(bias, dtype=torch.float64),
        offset,
        kind,
    )


def random_tensor(*shape: int, seed: int) -> Tensor:
    """Returns normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return numbers.to(torch.get_default_device())


@dataclass(frozen=True)
class Weights:
    """Arguments of `weigh` besides the block, for which tests may choose any numbers."""

    coefficients: Tensor  # (M + N); (2, M + N) with positives by id; one more row with a teacher
    positive_weight: Tensor  # (M)
    gain: Tensor


class Gradients(NamedTuple):
    dx: Tensor
    dy: Tensor
    totals: Tensor
    key_bias: Tensor
    conditions: tuple[float, float, float, float]
