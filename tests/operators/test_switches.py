"""Both sides of every numerical switch: whatever the features and the scale, the result is right.

The C++ engine takes one reference for all lines and, where that proves too coarse, a running
maximum for each. Which side it took shows in the state: references that are all equal, or not. The
plain PyTorch engine has no such switch and is held to the same truth.
"""

import pytest
import torch
from support.block_operators import make_weights, operator, sweep, weigh
from support.dense_block import DTYPES, LOG2E, Block, accumulator, make_block
from support.dense_truth import Dense, assert_gradients, assert_states, has_one_shift
from torch import Tensor

from fastclip import reference
from fastclip.engine import torch_engine
from fastclip.engine.kept import rows_to_keep
from fastclip.loss import clip_loss, siglip_loss

LOSSES = {"clip": clip_loss, "siglip": siglip_loss}
REFERENCES = {"clip": reference.clip_loss, "siglip": reference.siglip_loss}


pytestmark = pytest.mark.usefixtures("on_the_device")


@pytest.fixture(autouse=True)
def chunks_of_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain PyTorch engine merges as many states as it can; one without any negative, too."""
    monkeypatch.setattr(torch_engine, "CHUNK", 1)


def check(engine: str, block: Block, keep: int = 0, bound: Tensor | None = None) -> Tensor:
    """The state of a block, after both sweeps agreed with the truth."""
    dense = Dense(block)
    state, positive, kept = sweep(engine, block, keep, bound)
    assert_states(dense, state, positive)
    weights = make_weights(state, dense.m)
    exact = dense.gradients(dense.activations(state, weights.coefficients), weights)
    assert_gradients(dense, exact, weigh(engine, block, state, positive, weights, kept))
    return state


# ---- one reference or running maxima -------------------------------------------------------------


def random(dtype: torch.dtype, scale: float, shape: tuple[int, int]) -> Block:
    return make_block(*shape, 24, dtype, scale=scale)


def long(dtype: torch.dtype, scale: float, shape: tuple[int, int]) -> Block:
    """Features nobody normalised."""
    block = random(dtype, scale, shape)
    return block._replace(x=block.x * 30, y=block.y * 20)


def one_long(dtype: torch.dtype, scale: float, shape: tuple[int, int]) -> Block:
    """The bound speaks for one pair; all other logits are far below it."""
    block = random(dtype, scale, shape)
    block.x[3] *= 25
    block.y[5] *= 25
    return block


def one_low(dtype: torch.dtype, scale: float, shape: tuple[int, int]) -> Block:
    """All logits of one row, or of one column, its positive included, are far below the others."""
    block = random(dtype, scale, shape)
    towers = (block.x, block.y) if shape[0] < shape[1] else (block.y, block.x)
    towers[1][:, 0] = towers[1][:, 0].abs() + 1
    towers[0][7] = 0
    towers[0][7, 0] = -1
    return block


# Kind, scale, and for float64, which reaches farther, and for the others: is one reference enough?
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


# More than one of the C++ engine's blocks and tiles, so that maxima do run.
@pytest.mark.parametrize("shape", [(140, 90), (90, 140)], ids=["tall", "wide"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__}-{case[1]}")
def test_references(engine: str, case: tuple, dtype: str, shape: tuple[int, int]) -> None:
    kind, scale, *enough = case
    block = kind(DTYPES[dtype], scale, shape)
    state = check(engine, block)
    assert torch.equal(state[0], state[0].round()), "exponents are exact for integers alone"
    if engine == "cpu":
        assert has_one_shift(state) == enough[dtype != "float64"]
        itemsize = accumulator(DTYPES[dtype]).itemsize
        for budget in (64 * 90 * itemsize, 1 << 30):  # half the rows, all of them
            kept = check(engine, block, rows_to_keep(*shape, itemsize, budget))
            assert has_one_shift(kept) == has_one_shift(state)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_bound_that_is_one(engine: str, dtype: str) -> None:
    """A bound given by the caller, tight or far too high, does not change what comes out."""
    for scale in (14.3, 100.0):
        block = random(DTYPES[dtype], scale, (70, 50))
        for bound, enough in ((1.02, True), (50.0, None), (1e4, False)):
            state = check(engine, block, bound=torch.tensor(bound, dtype=torch.float64))
            if engine == "cpu" and enough is not None:
                assert has_one_shift(state) == enough


@pytest.mark.parametrize("scale", [1.0, 40.0, 43.0, 60.0, 76.0, 77.0, 100.0, 300.0])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_references_headroom(engine: str, dtype: str, scale: float) -> None:
    """The reference leaves 2^t above itself for the largest possible logit: as much as the smallest
    needs to be held, if that is no more than a sum over the columns can take. Logits at both ends
    of what is possible, on either side of both limits of t, are right."""
    depth, headroom = (1000, 900) if dtype == "float64" else (120, 100)
    if dtype == "float64":
        scale *= 10
    n, d = 40, 12
    block = make_block(n, n, d, DTYPES[dtype], scale=scale)
    block.y[4] = block.x[9] = torch.eye(d)[0]  # a negative with the largest possible logit
    block.y[6] = block.x[11] = torch.eye(d)[1]
    block.x[12] = -block.x[11]  # one with the smallest possible
    one = torch.tensor(1.0, dtype=torch.float64)
    state = check(engine, block, bound=one)
    if engine == "cpu":
        top = scale * LOG2E
        t = min(max(0.0, 2 * top - depth), headroom)
        assert has_one_shift(state) == (scale not in (300, 3000))  # no typical row reaches it
        if has_one_shift(state):
            assert abs(state[0, 0] - (top - t)) < 1.1  # rounded up, with a margin for rounding
    # All of a row's and all of a column's logits at the lower end, its positive's too: too low for
    # one reference, unless the scale is small.
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
    torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-12)
    for one, other in zip(inputs, others, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-7, atol=1e-12)


# ---- norms out of range --------------------------------------------------------------------------


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_norms_that_overflow(engine: str, dtype: str, swap: bool) -> None:
    """The bound is infinite or NaN, the logits are not: 1e20 by 1e-20, and by zeros."""
    huge = 1e200 if dtype == "float64" else 1e20
    block = random(DTYPES[dtype], 14.3, (50, 30))
    x, y = block.x * huge, block.y * (1 / huge)
    # Totals and gradients need products of the same size; states and positives are what counts.
    for short in (y, torch.zeros_like(y)):
        changed = block._replace(x=x, y=short)
        if swap:
            changed = changed._replace(x=short, y=x)
        dense = Dense(changed)
        state, positive, _ = sweep(engine, changed)
        assert_states(dense, state, positive)


def test_products_that_overflow_are_not_hidden(engine: str) -> None:
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
    """No negatives: CLIP's loss and gradients are exactly zero, SigLIP's those of one pair."""
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
    torch.testing.assert_close(value, truth, rtol=1e-12, atol=0)
    for one, other in zip(
        torch.autograd.grad(value, (x, y)), torch.autograd.grad(truth, (x, y)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [14.3, 1e4])
@pytest.mark.parametrize("shape", [(1, 30), (30, 1), (1, 1)], ids=str)
def test_a_line_of_nothing_but_its_positive(
    engine: str, shape: tuple[int, int], scale: float
) -> None:
    """Its sum is zero, its reference a number, and its loss and weights are zero."""
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
