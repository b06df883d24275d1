"""One rectangular block of logits, dense in float64: the truth of what the operators promise.

`make_block` invents a block, `Dense` answers for it what the operators answer, from the formulas
of their contract: all logits in one matrix, and masks of it. Plain torch, nothing of an engine, no
autograd.

Letters: `x (M, D)`, `y (N, D)`, `t_ij = <x_i, y_j> factor_x_i factor_y_j`, logits
`s_ij = scale t_ij + bias + key_bias_j`; the own positive of row i is column i + offset.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from support.judge import roundoff
from torch import Tensor

LOG2E = math.log2(math.e)
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class DenseKind(NamedTuple):
    """The truth about a kind of statistic, from logits in float64."""

    # A line's statistic in the units of `logarithms`, of the logits that a mask leaves it.
    statistic: Callable[[Tensor, Tensor, int], Tensor]
    # The weight of a logit, given a line's shift in log2 units.
    activation: Callable[[Tensor, Tensor], Tensor]
    # The statistic in these units, from a state's shift and sum.
    logarithm: Callable[[Tensor, Tensor], Tensor]
    has_shift: bool  # then a bias is not seen, and a statistic is judged by its difference
    sign_of_positives: int  # by id: of their logits and weights


def _softplus_sum(s: Tensor, mask: Tensor, dim: int) -> Tensor:
    return F.softplus(s, threshold=60).masked_fill(~mask, 0).sum(dim)


KINDS = {
    "softmax": DenseKind(
        lambda s, mask, dim: s.masked_fill(~mask, -torch.inf).logsumexp(dim) * LOG2E,
        lambda s, shift: torch.exp2(s * LOG2E - shift),
        lambda shift, sums: torch.log2(sums) + shift,
        has_shift=True,
        sign_of_positives=1,
    ),
    "sigmoid": DenseKind(
        _softplus_sum,
        lambda s, shift: torch.sigmoid(s),
        lambda shift, sums: sums,
        has_shift=False,
        sign_of_positives=-1,
    ),
}
LOSSES = tuple(KINDS)


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
    ids_x: Tensor | None = None  # (M)
    ids_y: Tensor | None = None  # (N)
    threshold_x: Tensor | None = None  # (M)
    threshold_y: Tensor | None = None  # (N)
    key_bias: Tensor | None = None  # (N)
    same_id_positive: bool = False

    @property
    def arguments(self) -> tuple[Any, ...]:
        """In the order of the schemas."""
        return (
            self.x, self.factor_x, self.ids_x, self.threshold_x, self.y, self.factor_y, self.ids_y,
            self.threshold_y, self.scale, self.bias, self.key_bias, self.offset, self.loss,
            self.same_id_positive,
        )  # fmt: skip


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


def make_masked_block(
    m: int,
    n: int,
    d: int,
    dtype: torch.dtype = torch.float32,
    *,
    ids: int | None = None,
    margin: float | None = None,
    key_bias: float | None = None,
    same_id_positive: bool = False,
    **options: Any,
) -> Block:
    """A block with `ids` different ids, thresholds `margin` above own positives, and biases of the
    columns of that size, one of them -inf."""
    block = make_block(m, n, d, dtype, **options)
    seed, extra = options.get("seed", 0), {}
    if ids is not None:
        names = [(_random(k, seed=seed + 7 * k).abs() * 1e4).int() % ids for k in (m, n)]
        extra |= {"ids_x": names[0], "ids_y": names[1], "same_id_positive": same_id_positive}
    if margin is not None:
        dense = Dense(block)
        t = dense.positive + margin
        partner = torch.arange(m) + block.offset
        inside = (partner >= 0) & (partner < n)
        of_columns = torch.full((n,), torch.inf, dtype=torch.float64)
        of_columns[partner[inside]] = t[inside]
        thresholds = (_between(t.nan_to_num(torch.inf), dense.t), _between(of_columns, dense.t.T))
        wide = accumulator(dtype)
        extra |= {"threshold_x": thresholds[0].to(wide), "threshold_y": thresholds[1].to(wide)}
    if key_bias is not None:
        extra["key_bias"] = key_bias * _random(n, seed=seed + 3)
        if KINDS[block.loss].has_shift or not same_id_positive:  # softplus(-s) is infinite there
            extra["key_bias"][n // 2] = -torch.inf
    return block._replace(**extra)


def _between(thresholds: Tensor, t: Tensor) -> Tensor:
    """Each moved halfway between the two products of its line around it, so that no rounding
    decides which pairs are above."""
    above = torch.where(t > thresholds[:, None], t, torch.inf).amin(1)
    below = torch.where(t > thresholds[:, None], -torch.inf, t).amax(1)
    middle = (above + below) / 2
    return torch.where(middle.isfinite(), middle, torch.where(above.isinf(), torch.inf, -torch.inf))


def occupied(block: Block) -> Tensor | None:
    """The lines that have pairs at all, thresholds aside; None where the engine knows."""
    if block.ids_x is None and block.key_bias is None:
        return None
    dense = Dense(block._replace(threshold_x=None, threshold_y=None))
    exists = torch.ones(dense.m, dense.n, dtype=torch.bool)
    if block.key_bias is not None:
        exists = exists & (block.key_bias > -torch.inf)
    sets = [dense.by_row, dense.is_same] if block.same_id_positive else [dense.by_row]
    return torch.stack(
        [torch.cat([(pairs & exists).any(1), (pairs & exists).any(0)]) for pairs in sets]
    )


def sweep(
    engine: str, block: Block, keep: int = 0, bound: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    return operator("sweep", engine)(*block.arguments, bound, occupied(block), keep)


@dataclass(frozen=True)
class Weights:
    """What `weigh` takes besides the block: any numbers will do."""

    coefficients: Tensor  # (M + N); (2, M + N) with positives by id
    positive_weight: Tensor  # (M)
    gain: Tensor


def make_weights(state: Tensor, m: int, gain: float = -0.7, seed: int = 1) -> Weights:
    """Coefficients that bring each line's weights to order 1; also weights for absent positives."""
    sums = state[1::2]
    coefficients = torch.exp2(_random(*sums.shape, seed=seed) / 3) / torch.where(
        sums > 1e-30, sums, 1
    )
    coefficients = coefficients if len(sums) > 1 else coefficients[0]
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
    results = weigh_all(engine, block, state, positive, weights, kept, needs, project, dtypes)
    return results[:3]


def weigh_all(
    engine: str,
    block: Block,
    state: Tensor,
    positive: Tensor,
    weights: Weights,
    kept: Tensor | None = None,
    needs: tuple[bool, bool] = (True, True),
    project: bool = False,
    dtypes: tuple[torch.dtype, torch.dtype] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `weigh`, and the gradient of a key bias behind it, where there is one."""
    dtype = accumulator(block.x.dtype)
    kept = block.x.new_empty(0, dtype=dtype) if kept is None else kept
    return operator("weigh", engine)(
        *block.arguments, state, positive, kept, weights.coefficients, weights.positive_weight,
        weights.gain, *needs, block.key_bias is not None, project, *(dtypes or (dtype, dtype)),
    )  # fmt: skip


def logarithms(state: Tensor, loss: str) -> Tensor:
    """States as one number a line: log2 of the sum of exponentials, or the sum of softplus; those
    of positives by id behind those of negatives."""
    shift, sums = state[::2].flatten(), state[1::2].flatten()
    return KINDS[loss].logarithm(shift, sums)


class Gradients(NamedTuple):
    dx: Tensor
    dy: Tensor
    totals: Tensor
    key_bias: Tensor
    conditions: tuple[float, float, float, float]


class Dense:
    """The truth of one block."""

    def __init__(self, block: Block) -> None:
        self.block, self.kind = block, KINDS[block.loss]
        self.x, self.y = (
            features.double() * (1 if factor is None else factor.double()[:, None])
            for features, factor in zip(block[:2], block[2:4], strict=True)
        )
        self.m, self.n = len(self.x), len(self.y)
        self.scale = float(block.scale)
        has_bias = block.bias is not None and not self.kind.has_shift
        self.bias = float(block.bias) if has_bias else 0.0
        self.t = self.x @ self.y.T
        self.s = self.scale * self.t + self.bias
        if block.key_bias is not None:
            self.s = self.s + block.key_bias.double()
        rows = torch.arange(self.m)[:, None] + block.offset
        self.is_positive = rows == torch.arange(self.n)
        same = torch.zeros_like(self.is_positive)
        if block.ids_x is not None:
            same = (block.ids_x[:, None] == block.ids_y) & ~self.is_positive
        self.is_same = same
        self.by_row = self.by_column = ~self.is_positive & ~same
        if block.threshold_x is not None:
            self.by_row = self.by_row & ~(self.t > block.threshold_x.double()[:, None])
            self.by_column = self.by_column & ~(self.t > block.threshold_y.double())

    @cached_property
    def positive(self) -> Tensor:
        """(M): t of the own positives, NaN where there is none in the block."""
        t = torch.where(self.is_positive, self.t, 0).sum(1)
        return torch.where(self.is_positive.any(1), t, torch.nan)

    @cached_property
    def logarithms(self) -> Tensor:
        """(M + N), or twice as many with positives by id: as the function of that name."""
        negatives = self._statistics(self.s, self.by_row, self.by_column)
        if not self.block.same_id_positive:
            return negatives
        s = self.kind.sign_of_positives * self.s
        return torch.cat([negatives, self._statistics(s, self.is_same, self.is_same)])

    def _statistics(self, s: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
        statistic = self.kind.statistic
        return torch.cat([statistic(s, by_row, 1), statistic(s, by_column, 0)])

    def activations(self, state: Tensor, coefficients: Tensor) -> Tensor:
        """(M, N): weights of the pairs, 0 at the own positives."""
        coefficients = coefficients.double().reshape(-1, self.m + self.n)
        w = self._weights(self.s, state[0], coefficients[0], self.by_row, self.by_column)
        if not self.block.same_id_positive:
            return w
        sign, same = self.kind.sign_of_positives, self.is_same
        return w + sign * self._weights(sign * self.s, state[2], coefficients[1], same, same)

    def _weights(
        self, s: Tensor, shifts: Tensor, coefficients: Tensor, by_row: Tensor, by_column: Tensor
    ) -> Tensor:
        a, b = coefficients.split([self.m, self.n])
        row, column = shifts.split([self.m, self.n])
        of_row = self.kind.activation(s, row[:, None]) * a[:, None]
        of_column = self.kind.activation(s, column) * b
        return of_row.masked_fill(~by_row, 0) + of_column.masked_fill(~by_column, 0)

    def gradients(self, w: Tensor, weights: Weights, project: bool = False) -> Gradients:
        """From the weights of the pairs beside the own positives."""
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
        columns, of_columns = gain * w.sum(0), abs(gain) * w.abs().sum(0)
        conditions += [_ratio(sizes, totals), _ratio(of_columns, columns)]
        return Gradients(*results, totals, columns, tuple(conditions))

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
        biases = abs(self.bias)
        if self.block.key_bias is not None:
            biases += float(self.block.key_bias.clamp_min(-1e3).abs().max())
        return abs(self.scale) * self.longest[0] * self.longest[1] + biases

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


def has_one_shift(state: Tensor) -> bool:
    """Whether the sweep with one shift for all lines was enough."""
    return bool((state[::2] == state[0, 0]).all())


def assert_states(dense: Dense, state: Tensor, positive: Tensor, what: str = "") -> None:
    """The operators' state and positives against the truth."""
    assert state.dtype == positive.dtype == torch.float64
    sets = 2 if dense.block.same_id_positive else 1
    assert state.shape == (2 * sets, dense.m + dense.n) and positive.shape == (dense.m,)
    assert state.isfinite().all(), what
    lines, exact = logarithms(state, dense.block.loss), dense.logarithms
    if dense.kind.has_shift:
        absent = exact == -torch.inf
        assert torch.equal(state[1::2].flatten() == 0, absent), f"{what}: lines without pairs"
        # The truth itself is a sum of a shift and a logarithm, in float64.
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
    results: tuple[Tensor, ...],
    needs: tuple[bool, bool] = (True, True),
    what: str = "",
    half_products: bool = False,
) -> None:
    """dx, dy, the totals, and the gradient of a key bias against the truth, each by its own
    condition. half_products: fp16 weights enter products in fp16, as bf16 ones do in any case."""
    x = dense.block.x
    # The C++ and plain engines widen fp16 on CPUs.
    takes_half = x.dtype == torch.bfloat16 or (x.dtype == torch.float16 and half_products)
    narrow = roundoff(x.dtype) if takes_half or (x.is_cuda and x.itemsize == 2) else 0.0
    if takes_tf32(x):
        narrow = 2.0**-11
    names = ("dx", "dy", "totals", "key bias")
    for name, result, truth, condition, needed in zip(
        names,
        results,
        exact,
        exact.conditions,
        (*needs, True, dense.block.key_bias is not None),
        strict=False,
    ):
        if not needed:
            assert result.shape == (0, *truth.shape[1:]), f"{what}: {name} was not asked for"
            continue
        assert result.shape == truth.shape, f"{what}: {name}"
        assert result.isfinite().all(), f"{what}: {name} is not finite"
        # Only the products that make dx and dy may take weights in half precision.
        weights = narrow if name in ("dx", "dy") else 0.0
        allowed = condition * (dense.arithmetic + weights) + roundoff(result.dtype)
        size = truth.norm()
        error = float((result.double() - truth).norm() / (size if size else 1))
        assert error <= allowed, f"{what}: {name} is off by {error:.2e}, allowed {allowed:.2e}"
