"""One rectangular block of logits, dense in float64: the truth of what `fastclip.ops` promises.

`make_block` invents a block, `Dense` answers for it what the operators answer, from the formulas
of their contract: all logits in one matrix, positives masked out of it. Plain torch, nothing of an
engine, no autograd.

Letters: `x (M, D)`, `y (N, D)`, `t_ij = <x_i, y_j> factor_x_i factor_y_j`, logits
`s_ij = scale t_ij + bias`; the positive of row i is column i + offset.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from judge import roundoff
from torch import Tensor

LOG2E = math.log2(math.e)
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
LOSSES = ("softmax", "sigmoid")


class Block(NamedTuple):
    """The arguments of an operator that describe the block."""

    x: Tensor  # (M, D)
    y: Tensor  # (N, D)
    factor_x: Tensor | None  # (M)
    factor_y: Tensor | None  # (N)
    scale: Tensor
    bias: Tensor | None
    offset: int
    loss: str

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:6]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Of logits, states and gradients for features of this dtype."""
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
    loss: str = "softmax",
    offset: int = 0,
    factors: tuple[bool, bool] = (False, False),
    scale: float = 14.3,
    bias: float | None = -3.0,
    seed: int = 0,
) -> Block:
    """On the default device: unit features, of any length where a factor normalises them.

    Positives stand out: one taken for a negative would change all figures of its row and column.
    """
    x, y = (_random(k, d, seed=seed + k) for k in (m, n))
    first = max(0, -offset)
    i = torch.arange(first, max(first, min(m, n - offset)))
    y[i + offset] = x[i] + 0.3 * y[i + offset]
    x, y = (
        (F.normalize(t) * (10 ** (_random(len(t), 1, seed=seed) / 3) if raw else 1)).to(dtype)
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
        loss,
    )


def _random(*shape: int, seed: int) -> Tensor:
    """The same normal numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return numbers.to(torch.get_default_device())


def operator(name: str, engine: str) -> Callable[..., Any]:
    return getattr(getattr(torch.ops.fastclip, name), engine)


def sweep(
    engine: str, block: Block, keep: int = 0, bound: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    return operator("sweep", engine)(*block.tensors, bound, block.offset, block.loss, keep)


@dataclass(frozen=True)
class Weights:
    """What `weigh` takes besides the block: any numbers will do."""

    coefficients: Tensor  # (M + N)
    positive_weight: Tensor  # (M)
    gain: Tensor


def make_weights(state: Tensor, m: int, gain: float = -0.7, seed: int = 1) -> Weights:
    """Coefficients that bring each line's weights to order 1; also weights for absent positives."""
    sums = state[1]
    coefficients = torch.exp2(_random(len(sums), seed=seed) / 3) / torch.where(sums > 0, sums, 1)
    positive = -torch.sigmoid(_random(m, seed=seed + 1))
    return Weights(coefficients, positive, torch.tensor(gain, dtype=torch.float64))


def weigh(
    engine: str,
    block: Block,
    state: Tensor,
    positive: Tensor,
    weights: Weights,
    kept: Tensor | None = None,
    needs: tuple[bool, bool] = (True, True),
    project: bool = False,
    dtypes: tuple[torch.dtype, torch.dtype] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulator(block.x.dtype)
    kept = block.x.new_empty(0, dtype=dtype) if kept is None else kept
    return operator("weigh", engine)(
        *block.tensors, state, positive, weights.coefficients, weights.positive_weight,
        weights.gain, kept, block.offset, block.loss, *needs, project, *(dtypes or (dtype, dtype)),
    )  # fmt: skip


def logarithms(state: Tensor, loss: str) -> Tensor:
    """A state as one number a line: log2 of the sum of exponentials, or the sum of softplus."""
    reference, sums = state
    return torch.log2(sums) + reference if loss == "softmax" else sums


class Gradients(NamedTuple):
    dx: Tensor
    dy: Tensor
    totals: Tensor
    conditions: tuple[float, float, float]


class Dense:
    """The truth of one block."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.x, self.y = (
            features.double() * (1 if factor is None else factor.double()[:, None])
            for features, factor in zip(block[:2], block[2:4], strict=True)
        )
        self.m, self.n = len(self.x), len(self.y)
        self.scale = float(block.scale)
        has_bias = block.bias is not None and block.loss == "sigmoid"
        self.bias = float(block.bias) if has_bias else 0.0
        self.t = self.x @ self.y.T
        self.s = self.scale * self.t + self.bias
        rows = torch.arange(self.m)[:, None] + block.offset
        self.is_positive = rows == torch.arange(self.n)

    @cached_property
    def positive(self) -> Tensor:
        """(M): t of the positives, NaN where there is none in the block."""
        t = torch.where(self.is_positive, self.t, 0).sum(1)
        return torch.where(self.is_positive.any(1), t, torch.nan)

    @cached_property
    def logarithms(self) -> Tensor:
        """(M + N): as the function of that name."""
        if self.block.loss == "softmax":
            s = self.s.masked_fill(self.is_positive, -torch.inf)
            return torch.cat([torch.logsumexp(s, 1), torch.logsumexp(s, 0)]) * LOG2E
        losses = F.softplus(self.s, threshold=60).masked_fill(self.is_positive, 0)
        return torch.cat([losses.sum(1), losses.sum(0)])

    def activations(self, state: Tensor, coefficients: Tensor) -> Tensor:
        """(M, N): weights of the negatives, 0 at the positives."""
        a, b = coefficients.double().split([self.m, self.n])
        if self.block.loss == "sigmoid":
            w = torch.sigmoid(self.s) * (a[:, None] + b)
        else:
            row, column = state[0].split([self.m, self.n])
            w = torch.exp2(self.s * LOG2E - row[:, None]) * a[:, None]
            w = w + torch.exp2(self.s * LOG2E - column) * b
        return w.masked_fill(self.is_positive, 0)

    def gradients(self, w: Tensor, weights: Weights, project: bool = False) -> Gradients:
        """From the weights of the negatives."""
        w = w + self.is_positive * weights.positive_weight.double()[:, None]
        gain = float(weights.gain)
        results, conditions = [], []
        for weight, mine, other, factor in (
            (w, self.x, self.y, self.block.factor_x),
            (w.T, self.y, self.x, self.block.factor_y),
        ):
            g = gain * self.scale * (weight @ other)
            size = abs(gain * self.scale) * (weight.abs() @ other.abs())
            if project and factor is not None:
                f = factor.double()[:, None]
                clamped = f >= 0.9999e12
                unit = torch.where(clamped, 0, mine)
                g = (g - unit * (unit * g).sum(1, keepdim=True)) * f
                size = (size + unit.abs() * (unit * size).abs().sum(1, keepdim=True)) * f
            results.append(g)
            conditions.append(_ratio(size, g))
        totals = gain * torch.stack([w.sum(), (w * self.t).sum()])
        sizes = abs(gain) * torch.stack([w.abs().sum(), (w * self.t).abs().sum()])
        return Gradients(*results, totals, (*conditions, _ratio(sizes, totals)))

    @cached_property
    def longest(self) -> list[float]:
        """The largest norm of either tower."""
        peaks = [float(features.abs().max()) or 1.0 for features in (self.x, self.y)]
        return [
            peak * float((features / peak).norm(dim=1).max())
            for features, peak in zip((self.x, self.y), peaks, strict=True)
        ]

    @property
    def largest(self) -> float:
        """A bound of the logits, which is what rounding errors in exponentials grow with."""
        return abs(self.scale) * self.longest[0] * self.longest[1] + abs(self.bias)

    @property
    def arithmetic(self) -> float:
        """The error of one careful exponential."""
        return 8 * roundoff(accumulator(self.block.x.dtype)) * (1 + self.largest)


def _ratio(size: Tensor, result: Tensor) -> float:
    return float(size.norm() / result.norm()) if result.any() else 1.0


def takes_tf32(x: Tensor) -> bool:
    """A GPU engine rounds these features, and weights, to tf32 before it multiplies them."""
    return x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def product_error(x: Tensor) -> float:
    """The error of <x_i, y_j> for unit features."""
    d = x.shape[1]
    terms = 8 + d**0.5
    if x.is_cuda and (x.itemsize == 2 or takes_tf32(x)):
        # Tensor cores truncate, so the errors of terms of one sign add up. Emulated on pairs that
        # are alike: at most 0.1 D roundoffs on Ampere (8 products a step), 0.05 D on Hopper (16).
        terms += d / 8
    return terms * roundoff(accumulator(x.dtype))


def has_one_reference(state: Tensor) -> bool:
    """Whether the sweep with one reference for all lines was enough."""
    return bool((state[0] == state[0, 0]).all())


def assert_states(dense: Dense, state: Tensor, positive: Tensor, what: str = "") -> None:
    """The operators' state and positives against the truth."""
    assert state.dtype == positive.dtype == torch.float64
    assert state.shape == (2, dense.m + dense.n) and positive.shape == (dense.m,)
    assert state.isfinite().all(), what
    lines, exact = logarithms(state, dense.block.loss), dense.logarithms
    if dense.block.loss == "softmax":
        absent = exact == -torch.inf
        assert torch.equal(state[1] == 0, absent), f"{what}: lines without negatives"
        # The truth itself is a sum of a reference and a logarithm, in float64.
        difference = (lines - exact)[~absent].abs() - 1e-15 * exact[~absent].abs()
    else:
        difference = (lines - exact).abs() / exact.clamp_min(1e-30)
    assert (difference <= dense.arithmetic).all(), f"{what}: states off by {difference.max()}"
    close = torch.isclose(positive, dense.positive, rtol=0, atol=_atol(dense), equal_nan=True)
    assert close.all(), f"{what}: positives {positive[~close]}, not {dense.positive[~close]}"


def _atol(dense: Dense) -> float:
    return product_error(dense.block.x) * dense.longest[0] * dense.longest[1]


def assert_gradients(
    dense: Dense,
    exact: Gradients,
    results: tuple[Tensor, Tensor, Tensor],
    needs: tuple[bool, bool] = (True, True),
    what: str = "",
    half_products: bool = False,
) -> None:
    """dx, dy and the totals against the truth, each by its own condition. half_products: fp16
    weights enter products in fp16, as bf16 ones do in any case."""
    x = dense.block.x
    # The C++ and plain engines widen fp16 on CPUs.
    takes_half = x.dtype == torch.bfloat16 or (x.dtype == torch.float16 and half_products)
    narrow = roundoff(x.dtype) if takes_half or (x.is_cuda and x.itemsize == 2) else 0.0
    if takes_tf32(x):
        narrow = 2.0**-11
    for name, result, truth, condition, needed in zip(
        ("dx", "dy", "totals"), results, exact, exact.conditions, (*needs, True), strict=False
    ):
        if not needed:
            assert result.shape == (0, dense.x.shape[1]), f"{what}: {name} was not asked for"
            continue
        assert result.shape == truth.shape, f"{what}: {name}"
        assert result.isfinite().all(), f"{what}: {name} is not finite"
        # Only the products that make dx and dy may take weights in half precision.
        weights = narrow if name != "totals" else 0.0
        allowed = condition * (dense.arithmetic + weights) + roundoff(result.dtype)
        size = truth.norm()
        error = float((result.double() - truth).norm() / (size if size else 1))
        assert error <= allowed, f"{what}: {name} is off by {error:.2e}, allowed {allowed:.2e}"
