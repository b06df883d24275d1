"""The right results of the operators on a block, dense in float64, and comparisons with them.

It uses plain torch, without autograd and without any engine.
"""

from functools import cached_property

import torch
from support.dense_block import DENSE_KINDS, LOG2E, Block, Gradients, Weights, accumulator
from support.dense_teacher import ROWS, Teacher, target_products
from support.judge import roundoff
from support.rounding import product_error, takes_tf32
from torch import Tensor


class Dense:
    """The right results for a block: all logits in one matrix, and masks of it.

    levels: those of a kind with levels, by default some that no logit is close to.
    """

    def __init__(self, block: Block, levels: Tensor | None = None) -> None:
        self.block, self.kind = block, DENSE_KINDS[block.kind]
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
            compared = target_products(block) if block.guided else self.t
            self.by_row = self.by_row & ~(compared > block.threshold_x.double()[:, None])
            self.by_column = self.by_column & ~(compared > block.threshold_y.double())
        self.teacher = None if block.target_scale is None else Teacher(block, self.t)
        self.levels = None
        if self.kind.has_levels:
            self.levels = self._levels() if levels is None else levels

    @cached_property
    def positive(self) -> Tensor:
        """(M): t of the own positives, NaN for those outside the block."""
        t = torch.where(self.is_positive, self.t, 0).sum(1)
        return torch.where(self.is_positive.any(1), t, torch.nan)

    @cached_property
    def logarithms(self) -> Tensor:
        """(M + N), or (2 (M + N)) with positives by id: the results expected of `logarithms`."""
        negatives = self._statistics(self.s, self.by_row, self.by_column)
        if not self.block.same_id_positive:
            return negatives
        s = self.kind.sign_of_positives * self.s
        return torch.cat([negatives, self._statistics(s, self.is_same, self.is_same)])

    def _statistics(self, s: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
        statistic, row, column = self.kind.statistic, 0.0, 0.0
        if self.levels is not None:
            row, column = (self.levels / LOG2E).split([self.m, self.n])
            row = row[:, None]
        return torch.cat([statistic(s - row, by_row, 1), statistic(s - column, by_column, 0)])

    def _levels(self) -> Tensor:
        """Returns a level for each line, in log2 units: in the middle of the widest gap between two
        logits near the line's median, so that rounding cannot decide which pairs lie above. Without
        a gap all of a line's pairs lie above, or none."""
        s = self.s * LOG2E
        return torch.cat([self._gaps(s, self.by_row), self._gaps(s.T, self.by_column.T)])

    def _gaps(self, s: Tensor, counts: Tensor) -> Tensor:
        s = s.masked_fill(~counts, -torch.inf).sort(1, descending=True).values
        size = s.isfinite().sum(1, keepdim=True)
        s = torch.where(s.isfinite(), s, 0)
        rank = torch.arange(1, s.shape[1])
        near = (rank > size // 4) & (rank < size) & (rank <= size - size // 4)
        gaps = torch.where(near, s[:, :-1] - s[:, 1:], -1.0)
        gaps = torch.cat([gaps, torch.full((len(s), 1), -1.0, dtype=gaps.dtype)], 1)
        widest, place = gaps.max(1, keepdim=True)
        between = (s.gather(1, place) + s.gather(1, (place + 1).clamp_max(s.shape[1] - 1))) / 2
        ends = torch.stack([s.amax(1) + 1, s.amin(1) - 1], 1)
        end = ends.gather(1, torch.arange(len(s))[:, None] % 2)
        return torch.where(widest > 8 * self.arithmetic, between, end).squeeze(1)

    @cached_property
    def above(self) -> Tensor:
        """(M + N): how many pairs lie above the level of each line."""
        row, column = self.levels.split([self.m, self.n])
        s = self.s * LOG2E
        return torch.cat(
            [
                ((s > row[:, None]) & self.by_row).sum(1),
                ((s > column) & self.by_column).sum(0),
            ]
        ).double()

    def activations(self, state: Tensor, coefficients: Tensor) -> Tensor:
        """Returns (M, N), the weights of the pairs; without a teacher 0 at own positives."""
        coefficients = coefficients.double().reshape(-1, self.m + self.n)
        shifts = state[0] if self.levels is None else self.levels
        w = self._weights(self.s, shifts, coefficients[0], self.by_row, self.by_column)
        if self.teacher is not None:
            w += self.teacher.weights(state[-ROWS], coefficients[-1])
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
        """Returns the gradients, given the weights of all pairs except own positives."""
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
        """A bound of the logits, in proportion to which rounding errors of exponentials grow."""
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


def has_one_shift(state: Tensor) -> bool:
    """Returns True if one shift served all lines of a sweep. That of a teacher is its own."""
    own = state[:-ROWS] if len(state) % 2 else state
    teacher = state[len(own) :: ROWS]
    return bool((own[::2] == state[0, 0]).all() and (teacher == teacher[:, :1]).all())


def assert_states(dense: Dense, state: Tensor, positive: Tensor, what: str = "") -> None:
    """Asserts that the state and the positives of a sweep are right."""
    assert state.dtype == positive.dtype == torch.float64
    rows = (4 if dense.block.same_id_positive else 2) + ROWS * (dense.teacher is not None)
    assert state.shape == (rows, dense.m + dense.n) and positive.shape == (dense.m,)
    assert state.isfinite().all(), what
    if dense.teacher is not None:
        bound = dense.longest[0] * dense.longest[1]
        dense.teacher.assert_states(state[-ROWS:], _atol(dense), bound, what)
        state = state[:-ROWS]
    lines, exact = logarithms(state, dense.block.kind), dense.logarithms
    if dense.kind.has_shift:
        absent = exact == -torch.inf
        assert torch.equal(state[1::2].flatten() == 0, absent), f"{what}: lines without pairs"
        # The truth, too, is a rounded float64 sum of a shift and a logarithm.
        difference = (lines - exact)[~absent].abs() - 1e-15 * exact[~absent].abs()
    elif dense.kind.has_levels:
        assert torch.equal(state[0], dense.above), f"{what}: pairs above their levels"
        # The error of a pair's term is one of its logit.
        difference = (lines - exact).abs() / (exact + dense.above).clamp_min(1e-30)
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
    """Asserts that dx, dy, the totals, and the gradient of a key bias are right.

    The condition of each limits its error. With half_products, fp16 weights enter products in fp16;
    bf16 weights always enter them in bf16.
    """
    x = dense.block.x
    # On CPUs the C++ and the plain PyTorch engine widen fp16.
    takes_half = x.dtype == torch.bfloat16 or (x.dtype == torch.float16 and half_products)
    narrow = roundoff(x.dtype) if takes_half or (x.is_cuda and x.itemsize == 2) else 0.0
    if takes_tf32(x):
        narrow = 2.0**-11
    names = ("dx", "dy", "totals", "key bias")
    teachers = [] if dense.teacher is None else [dense.teacher]
    for name, result, truth, condition, needed in zip(
        names,
        results,
        exact,
        exact.conditions,
        (*needs, True, dense.block.key_bias is not None),
        strict=False,
    ):
        if not needed:
            assert result.shape == (0, *truth.shape[1:]), f"{what}: {name} was not requested"
            continue
        assert result.shape == truth.shape, f"{what}: {name}"
        assert result.isfinite().all(), f"{what}: {name} is not finite"
        # Only the products that make dx and dy may take weights in half precision.
        weights = narrow if name in ("dx", "dy") else 0.0
        exponentials = max([dense.arithmetic, *(t.arithmetic for t in teachers)])
        allowed = condition * (exponentials + weights) + roundoff(result.dtype)
        size = truth.norm()
        error = float((result.double() - truth).norm() / (size if size else 1))
        assert error <= allowed, f"{what}: {name} is off by {error:.2e}, allowed {allowed:.2e}"


def logarithms(state: Tensor, kind: str) -> Tensor:
    """Returns one number a line: log2 of the sum of exponentials, or the sum of softplus.

    The numbers of positives by id follow those of negatives.
    """
    shift, sums = state[::2].flatten(), state[1::2].flatten()
    return DENSE_KINDS[kind].logarithm(shift, sums)
