"""Results are right on both sides of every numerical switch, for any features and any scale.

The C++ engine takes one shift for all lines or, if that proves too coarse, a running maximum for
each. The state shows which: shifts are all equal, or not. The plain PyTorch engine has no such
switch and is compared with the same truth.
"""

import pytest
import torch
from support.block_operators import make_weights, operator, sweep, weigh
from support.dense_block import DTYPES, LOG2E, Block, accumulator, make_block
from support.dense_truth import Dense, assert_gradients, assert_states, has_one_shift
from support.losses import LOSSES, REFERENCES
from support.shift_cases import (
    check_that_no_loss_is_invented,
    column_below,
    lines_of_one_pair,
)
from torch import Tensor

from fastclip import reference
from fastclip.engine import chunked_block
from fastclip.engine.kept import rows_to_keep
from fastclip.loss import clip_loss, siglip_loss

pytestmark = pytest.mark.usefixtures("on_the_device")


@pytest.fixture(autouse=True)
def chunks_of_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the plain PyTorch engine merge as many states as it can, also without negatives."""
    monkeypatch.setattr(chunked_block, "CHUNK", 1)


def check(engine: str, block: Block, keep: int = 0, bound: Tensor | None = None) -> Tensor:
    """Returns the state of a block, and checks both sweeps against the truth."""
    dense = Dense(block)
    state, positive, kept = sweep(engine, block, keep, bound)
    assert_states(dense, state, positive)
    weights = make_weights(state, dense.m)
    exact = dense.gradients(dense.activations(state, weights.coefficients), weights)
    assert_gradients(dense, exact, weigh(engine, block, state, positive, weights, kept))
    return state


# ---- one shift or running maxima -----------------------------------------------------------------


def random(dtype: torch.dtype, scale: float, shape: tuple[int, int], offset: int = 0) -> Block:
    return make_block(*shape, 24, dtype, scale=scale, offset=offset)


def long(dtype: torch.dtype, scale: float, shape: tuple[int, int], offset: int = 0) -> Block:
    """Makes a block of features that are not normalised."""
    block = random(dtype, scale, shape, offset)
    return block._replace(x=block.x * 30, y=block.y * 20)


def one_long(dtype: torch.dtype, scale: float, shape: tuple[int, int], offset: int = 0) -> Block:
    """Makes a block with one logit near the bound; all others are far below it."""
    block = random(dtype, scale, shape, offset)
    block.x[3] *= 25
    block.y[5] *= 25
    return block


def one_low(dtype: torch.dtype, scale: float, shape: tuple[int, int], offset: int = 0) -> Block:
    """Makes a block with one line whose logits, positive included, are far below all others."""
    block = random(dtype, scale, shape, offset)
    towers = (block.x, block.y) if shape[0] < shape[1] else (block.y, block.x)
    towers[1][:, 0] = towers[1][:, 0].abs() + 1
    towers[0][7] = 0
    towers[0][7, 0] = -1
    return block


# The function that makes the block, its scale, and if one shift is enough: first in float64, whose
# exponents reach farther, then in the other dtypes.
CASES = [
    (random, 1e-3, True, True),
    (random, 14.3, True, True),
    (random, 100.0, True, True),
    (random, 1e4, False, False),
    (random, -100.0, True, True),
    (random, -1e4, False, False),
    (random, 0.0, True, True),
    (long, 1.0, True, False),
    (long, 14.3, False, False),
    (one_long, 14.3, False, False),
    (one_low, 14.3, True, True),
    (one_low, 100.0, True, False),
    (one_low, 2e3, False, False),
]


def name_of(case: tuple) -> str:
    return f"{case[0].__name__}-{case[1]}"


# Shapes of several strips of rows and tiles of the C++ engine, so that maxima are updated.
@pytest.mark.parametrize("shape", [(140, 90), (90, 140)], ids=["tall", "wide"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_one_shift_or_running_maxima(
    engine: str, case: tuple, dtype: str, shape: tuple[int, int]
) -> None:
    make, scale, *enough = case
    block = make(DTYPES[dtype], scale, shape)
    state = check(engine, block)
    assert torch.equal(state[0], state[0].round()), (
        "powers of two are exact only for integral shifts"
    )
    if engine == "cpu":
        assert has_one_shift(state) == enough[dtype != "float64"]
        itemsize = accumulator(DTYPES[dtype]).itemsize
        for budget in (64 * 90 * itemsize, 1 << 30):  # half the rows, all of them
            kept = check(engine, block, rows_to_keep(*shape, itemsize, budget))
            assert has_one_shift(kept) == has_one_shift(state)


@pytest.mark.parametrize("offset", [3, -7, 60])
@pytest.mark.parametrize("shape", [(140, 90), (90, 140)], ids=["tall", "wide"])
@pytest.mark.parametrize("case", [CASES[k] for k in (1, 3, 7, 10, 11)], ids=name_of)
def test_shifts_beside_the_diagonal(
    engine: str, case: tuple, shape: tuple[int, int], offset: int
) -> None:
    make, scale, *enough = case
    state = check(engine, make(torch.float32, scale, shape, offset))
    if engine == "cpu":
        assert has_one_shift(state) == enough[1]


@pytest.mark.parametrize("along", [-0.11, -0.30])
def test_a_column_that_one_shift_would_blur_gets_its_own(engine: str, along: float) -> None:
    """Its sum would be about 2^-115 or 2^-140: terms below 2^-126, which the C++ engine takes for
    zero, would be lost."""
    assert not has_one_shift(check(engine, column_below(0, along, across=0.15)))


def test_lines_of_one_pair_need_no_shift(engine: str) -> None:
    for block in lines_of_one_pair():
        state = check(engine, block)
        if engine == "cpu":
            assert has_one_shift(state)


@pytest.mark.parametrize("scale, all_finite", [(1e8, True), (1e10, False)])
def test_no_loss_of_an_absurd_scale_is_invented(
    engine: str, scale: float, all_finite: bool
) -> None:
    check_that_no_loss_is_invented(engine, 33, scale, all_finite or engine == "torch")


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_valid_bound_gives_the_same_results(engine: str, dtype: str) -> None:
    """A bound given by the caller, tight or far too high, does not change results."""
    for scale in (14.3, 100.0):
        block = random(DTYPES[dtype], scale, (70, 50))
        for bound, enough in ((1.02, True), (50.0, None), (1e4, False)):
            state = check(engine, block, bound=torch.tensor(bound, dtype=torch.float64))
            if engine == "cpu" and enough is not None:
                assert has_one_shift(state) == enough


@pytest.mark.parametrize("scale", [1.0, 40.0, 43.0, 60.0, 76.0, 77.0, 100.0, 300.0])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_headroom_above_the_shift(engine: str, dtype: str, scale: float) -> None:
    """The largest possible logit lies t above the shift, in log2 units, so its exponential is 2^t.

    t is as large as the exponential of the smallest possible logit needs, up to the limit at which
    a sum over the columns would overflow. Logits at both ends of the possible range are right, for
    t on either side of both its limits.
    """
    depth, headroom = (1000, 900) if dtype == "float64" else (120, 100)
    if dtype == "float64":
        scale *= 10
    n, d = 40, 12
    block = make_block(n, n, d, DTYPES[dtype], scale=scale)
    block.y[4] = block.x[9] = torch.eye(d)[0]  # a negative with the largest possible logit
    block.y[6] = block.x[11] = torch.eye(d)[1]
    block.x[12] = -block.x[11]  # a negative with the smallest possible logit
    one = torch.tensor(1.0, dtype=torch.float64)
    state = check(engine, block, bound=one)
    if engine == "cpu":
        top = scale * LOG2E
        t = min(max(0.0, 2 * top - depth), headroom)
        assert has_one_shift(state) == (scale not in (300, 3000))  # typical rows lie too low
        if has_one_shift(state):
            assert abs(state[0, 0] - (top - t)) < 1.1  # rounded up, with a margin for rounding
    # All logits of a row and of a column, positives included, are at the lower end: too low for one
    # shift, unless the scale is small.
    lowest = block._replace(y=torch.eye(d)[[2]].expand(n, d).to(block.y).clone())
    lowest.x[5] = -lowest.y[0]
    lowest.x[20] = lowest.y[0]
    state = check(engine, lowest, bound=one)
    if engine == "cpu":
        assert has_one_shift(state) == (scale == 1.0 or scale == 10.0)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scale", [0.0, -0.0, -14.3, -1e4, 1e4])
def test_zero_and_negative_scales(engine: str, loss: str, scale: float) -> None:
    block = random(torch.float64, scale, (33, 33))
    inputs = [t.clone().requires_grad_() for t in (block.x, block.y, block.scale)]
    others = [t.clone().requires_grad_() for t in (block.x, block.y, block.scale)]
    value, truth = LOSSES[loss](*inputs, -2.0, backend=engine), REFERENCES[loss](*others, -2.0)
    value.backward()
    truth.backward()
    torch.testing.assert_close(value, truth, rtol=1e-14, atol=1e-15)
    for one, other in zip(inputs, others, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-13)


# ---- norms out of range --------------------------------------------------------------------------


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_norms_that_overflow(engine: str, dtype: str, swap: bool) -> None:
    """The bound is infinite or NaN but the logits are finite: 1e20 times 1e-20, and times zero."""
    huge = 1e200 if dtype == "float64" else 1e20
    block = random(DTYPES[dtype], 14.3, (50, 30))
    x, y = block.x * huge, block.y * (1 / huge)
    # Only states and positives are checked: totals and gradients may overflow.
    for short in (y, torch.zeros_like(y)):
        changed = block._replace(x=x, y=short)
        if swap:
            changed = changed._replace(x=short, y=x)
        dense = Dense(changed)
        state, positive, _ = sweep(engine, changed)
        assert_states(dense, state, positive)


def test_products_that_overflow_show_in_the_loss(engine: str) -> None:
    block = random(torch.float32, 1.0, (40, 40))
    for loss in LOSSES.values():
        x, y = (t.clone().mul_(1e20).requires_grad_() for t in (block.x, block.y))
        value = loss(x, y, 1.0, backend=engine)
        value.backward()
        assert not value.isfinite()


# ---- lines without negatives ---------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_pair(engine: str, dtype: str, normalize: bool) -> None:
    """Without negatives CLIP's loss and gradients are zero, and SigLIP's those of one positive."""
    for scale in (0.0, 1.0, 100.0, -1e4, 1e30):
        x, y = (torch.randn(1, 9).to(DTYPES[dtype]).requires_grad_() for _ in range(2))
        s = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
        for reduction in ("mean", "none"):
            value = clip_loss(x, y, s, normalize=normalize, reduction=reduction, backend=engine)
            gradients = torch.autograd.grad(value.sum(), (x, y, s))
            assert not value.any(), scale
            assert not any(g.any() for g in gradients), scale
    x, y = (t.detach().double().requires_grad_() for t in (x, y))
    arguments = (x, y, 2.0, -1.0)
    value = siglip_loss(*arguments, normalize=normalize, backend=engine)
    truth = reference.siglip_loss(*arguments, normalize=normalize)
    torch.testing.assert_close(value, truth, rtol=5e-15, atol=0)
    for one, other in zip(
        torch.autograd.grad(value, (x, y)), torch.autograd.grad(truth, (x, y)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=5e-15, atol=0)


@pytest.mark.parametrize("scale", [14.3, 1e4])
@pytest.mark.parametrize("shape", [(1, 30), (30, 1), (1, 1)], ids=str)
def test_a_line_without_negatives(engine: str, shape: tuple[int, int], scale: float) -> None:
    """Its sum is zero, its shift is finite, and its loss and weights are zero."""
    block = make_block(*shape, 8, scale=scale)
    m = shape[0]
    state = check(engine, block)
    positive = sweep(engine, block)[1]
    alone = 0 if shape[1] == 1 else m  # the row, or the column, of the only positive
    losses, _, weights = operator("finish", engine)(
        state[:, [alone]].contiguous(), positive[[0]], block.scale, None, block.kind
    )
    assert losses.tolist() == [0.0]
    assert weights.tolist() == [0.0]
