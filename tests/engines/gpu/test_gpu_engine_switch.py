"""Both sides of the GPU engines' numerical switch, and values that must show on either side.

One shift serves all lines or, if it proves too coarse, every line gets its own. The device decides,
so that only the state shows the decision. The truth is a dense float64 computation.
"""

import math

import pytest
import torch
from support.block_operators import operator, sweep
from support.dense_block import LOG2E, Block, make_block
from support.dense_truth import Dense, assert_states, has_one_shift
from support.gpu_engine_case import check, enlarged
from support.losses import LOSSES, REFERENCES
from support.shift_cases import (
    check_that_no_loss_is_invented,
    column_below,
    lines_of_one_pair,
)
from torch import Tensor

from fastclip.loss import clip_loss

pytestmark = pytest.mark.usefixtures("on_the_device")
SHAPE = enlarged(40, 33)


def random(scale: float, offset: int = 0) -> Block:
    return make_block(*SHAPE, 24, scale=scale, offset=offset)


def long(scale: float, offset: int = 0) -> Block:
    """Features are not normalised."""
    block = random(scale, offset)
    return block._replace(x=block.x * 30, y=block.y * 20)


def one_long(scale: float, offset: int = 0) -> Block:
    """The bound fits one pair; all other logits are far below it."""
    block = random(scale, offset)
    block.x[3] *= 25
    block.y[5] *= 25
    return block


def low_row(scale: float, offset: int = 0) -> Block:
    """All logits of one row, its positive included, are far below the others."""
    block = random(scale, offset)
    block.y[:, 0] = block.y[:, 0].abs() + 1
    block.x[7] = 0
    block.x[7, 0] = -1
    return block


def low_column(scale: float, offset: int = 0) -> Block:
    block = random(scale, offset)
    block.x[:, 0] = block.x[:, 0].abs() + 1
    block.y[-1] = 0
    block.y[-1, 0] = -1
    return block


CASES = [
    (random, 0.0, True),
    (random, 1e-3, True),
    (random, 1.0, True),
    (random, 14.3, True),
    (random, 100.0, True),
    (random, 112.3, True),
    (random, 1e4, False),
    (random, -14.3, True),
    (random, -1e4, False),
    (long, 1.0, False),
    (one_long, 14.3, False),
    (low_row, 14.3, True),
    (low_row, 100.0, False),
    (low_column, 100.0, False),
]


def name_of(case: tuple) -> str:
    return f"{case[0].__name__} at {case[1]}"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_shifts(gpu_engine: str, case: tuple) -> None:
    make, scale, enough = case
    state = check(gpu_engine, make(scale))
    assert torch.equal(state[0], state[0].round()), "exponents are exact for integers alone"
    assert has_one_shift(state) == enough


@pytest.mark.parametrize("along", [-0.11, -0.30])
def test_a_column_that_one_shift_would_blur_gets_its_own(gpu_engine: str, along: float) -> None:
    """Its sum would be about 2^-115 or 2^-140: not zero, but with few digits left in fp32."""
    state = check(gpu_engine, column_below(0, along, across=0.15))
    assert not has_one_shift(state)


@pytest.mark.parametrize("offset", [5, -5])
def test_a_column_is_judged_without_positives(gpu_engine: str, offset: int) -> None:
    """The positive of another row, mistaken for its own, must not hide the lost negatives."""
    state = check(gpu_engine, column_below(offset, along=-1.0, across=0.0))
    assert not has_one_shift(state)


def test_lines_of_one_pair_need_no_shift(gpu_engine: str) -> None:
    for block in lines_of_one_pair():
        assert has_one_shift(check(gpu_engine, block))


@pytest.mark.parametrize("offset", [3, -5])
@pytest.mark.parametrize("case", [CASES[k] for k in (3, 6, 10, 12, 13)], ids=name_of)
def test_shifts_beside_the_diagonal(gpu_engine: str, case: tuple, offset: int) -> None:
    make, scale, enough = case
    assert has_one_shift(check(gpu_engine, make(scale, offset))) == enough


def test_a_row_is_judged_without_its_positive(gpu_engine: str) -> None:
    """One shift loses its negatives, and its positive, far above them, must not hide that: losses
    may use the negatives alone."""
    block = random(100.0)
    x = torch.cat((torch.ones(1), torch.zeros(23)))
    block.y[:] = -x + 0.1 * block.y
    block.y[0] = block.x[0] = x
    block.x[1:] = -block.x[1:].abs() * 0.1 - x
    state = check(gpu_engine, block._replace(x=torch.nn.functional.normalize(block.x)))
    assert not has_one_shift(state)


@pytest.mark.parametrize("bound, enough", [(1.02, True), (1e4, False)])
def test_any_upper_bound_gives_right_states(gpu_engine: str, bound: float, enough: bool) -> None:
    state = check(gpu_engine, random(100.0), bound=torch.tensor(bound, dtype=torch.float64))
    assert has_one_shift(state) == enough


@pytest.mark.parametrize("scale", [1.0, 43.0, 60.0, 76.0])
def test_the_shift_leaves_room_above_and_below(gpu_engine: str, scale: float) -> None:
    """The block has a negative with the largest possible logit and one with the smallest."""
    block = make_block(*enlarged(33, 33), 12, scale=scale)
    block.y[4] = block.x[9] = torch.eye(12)[0]
    block.y[6] = block.x[11] = torch.eye(12)[1]
    block.x[12] = -block.x[11]
    state = check(gpu_engine, block, bound=torch.ones((), dtype=torch.float64))
    top = scale * LOG2E
    assert abs(state[0, 0] - (top - min(max(0.0, 2 * top - 120), 100))) < 1.1


@pytest.mark.parametrize("swap", [False, True])
def test_norms_that_overflow(gpu_engine: str, swap: bool) -> None:
    """The bound is infinite or NaN, the logits are not: 1e20 by 1e-20, and by zeros."""
    block = random(14.3)
    for short in (block.y * 1e-20, torch.zeros_like(block.y)):
        changed = block._replace(x=block.x * 1e20, y=short)
        if swap:
            changed = changed._replace(x=short, y=block.x * 1e20)
        state, positive, _ = sweep(gpu_engine, changed)
        assert_states(Dense(changed), state, positive)


@pytest.mark.parametrize("scale", [14.3, 1e4])
@pytest.mark.parametrize("shape", [(1, *enlarged(40)), (*enlarged(40), 1), (1, 1)], ids=str)
def test_a_line_without_negatives(gpu_engine: str, shape: tuple[int, int], scale: float) -> None:
    """Its sum is zero, its shift a number, and its loss and weights are zero."""
    block = make_block(*shape, 8, scale=scale)
    state = check(gpu_engine, block)
    alone = 0 if shape[1] == 1 else shape[0]
    positive = sweep(gpu_engine, block)[1][[0]]
    losses, _, weights = operator("finish", gpu_engine)(
        state[:, [alone]].contiguous(), positive, block.scale, None, "softmax"
    )
    assert losses.tolist() == [0.0] and weights.tolist() == [0.0]


@pytest.mark.parametrize("scale", [0.0, 14.3, 100.0])
def test_positives_tie_with_their_duplicates(gpu_engine: str, scale: float) -> None:
    """If all features are equal, every row's loss is log(N)."""
    n = SHAPE[1]
    x = make_block(n, n, 24).x[:1].repeat(n, 1)
    loss = clip_loss(x, x, scale, backend=gpu_engine, memory_budget=0)
    assert abs(float(loss) - math.log(n)) < 1e-5


def test_positives_tie_with_their_duplicates_beyond_one_shift(gpu_engine: str) -> None:
    """One row is so low that every line gets a shift of its own. Rows of all other pairs have N
    equal logits, columns N - 1."""
    n = SHAPE[1]
    x = make_block(n, n, 300).x[:1].repeat(n, 1)
    y = x.clone()
    x[-1] *= -1
    options = {"reduction": "none", "memory_budget": 0}
    losses = clip_loss(x, y, 1e4, backend=gpu_engine, **options)[:-1]
    expected = torch.full_like(losses, (math.log(n) + math.log(n - 1)) / 2)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)


# ---- NaN, infinities and absurd scales must show -------------------------------------------------


def gradients(
    engine: str, loss: str, x: Tensor, y: Tensor, scale: float, normalize: bool
) -> list[Tensor]:
    inputs = [t.clone().requires_grad_() for t in (x, y, torch.tensor(scale, dtype=torch.float64))]
    value = LOSSES[loss](*inputs, -1.0, normalize=normalize, backend=engine, memory_budget=0)
    value.backward()
    return [value.detach(), *(t.grad for t in inputs)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("loss", LOSSES)
def test_spoilt_features_show(gpu_engine: str, loss: str, value: float) -> None:
    """They show in loss and gradients, also from the last lane of the last tile, and in half
    precision."""
    for dtype in (torch.float32, torch.float16):
        x, y = torch.randn(2, SHAPE[1], 6).unbind()
        x[-1, 5] = value
        results = gradients(gpu_engine, loss, x.to(dtype), y.to(dtype), 2.0, normalize=False)
        if math.isnan(value):
            assert results[0].isnan()
        assert not all(t.isfinite().all() for t in results[1:])


@pytest.mark.parametrize("loss", LOSSES)
def test_absurd_scales_give_the_loss_or_no_number(gpu_engine: str, loss: str) -> None:
    x, y = torch.randn(2, SHAPE[1], 6).unbind()
    for scale in (math.nan, math.inf, 1e30, -1e30, 1e8, 1e300):
        ours = float(gradients(gpu_engine, loss, x, y, scale, normalize=True)[0])
        exact = float(REFERENCES[loss](x.double(), y.double(), scale, -1.0, normalize=True))
        assert not math.isfinite(ours) or ours == pytest.approx(exact, rel=1e-2), scale


@pytest.mark.parametrize("scale, all_finite", [(1e8, True), (1e10, False)])
def test_no_loss_of_an_absurd_scale_is_invented(
    gpu_engine: str, scale: float, all_finite: bool
) -> None:
    check_that_no_loss_is_invented(gpu_engine, SHAPE[1], scale, all_finite)


def test_a_positive_that_is_not_finite_is_not_lost(gpu_engine: str) -> None:
    block = make_block(*enlarged(33, 40), 6)
    block.x[3, 0] = block.y[3, 0] = 1e20
    positive = sweep(gpu_engine, block)[1]
    assert not positive[3].isfinite() and positive[:3].isfinite().all()
