"""Targets: a teacher's weights of all pairs, and a guide that thresholds look at.

The truth is a dense float64 computation.
"""

import pytest
import torch
from support.block_cases import SHAPES, compiled_only, for_every_kind, in_every_dtype
from support.block_operators import make_weights, sweep, weigh_all
from support.dense_block import DTYPES, accumulator, make_block
from support.dense_truth import Dense, has_one_shift
from support.masked_block import make_masked_block
from support.masked_cases import OFFSETS, OPTIONS, check_masked, masked_blocks
from support.target_cases import with_guide, with_teacher

from fastclip.engine import torch_engine
from fastclip.engine.kept import rows_to_keep

pytestmark = pytest.mark.usefixtures("on_the_device", "chunks_of_plain_pytorch")

WITHOUT_THRESHOLDS = [name for name, options in OPTIONS.items() if "margin" not in options]
SHIFT, SUM, MOMENT = -3, -2, -1  # the rows of a state that a teacher adds


# ---- a teacher -----------------------------------------------------------------------------------


@in_every_dtype
@for_every_kind
@pytest.mark.parametrize("shape", ["tall", "wide", "row", "column", "long features"])
def test_a_teacher_on_plain_blocks(engine: str, shape: str, kind: str, dtype: str) -> None:
    for name, offset in OFFSETS.items():
        block = make_block(*SHAPES[shape], DTYPES[dtype], kind=kind, offset=offset)
        for width in (1, 24, 150):
            check_masked(engine, with_teacher(block, width), f"positives {name}, {width=}")


@pytest.mark.parametrize("options", OPTIONS)
@for_every_kind
def test_a_teacher_weighs_every_pair(engine: str, kind: str, options: str) -> None:
    """Neither ids nor thresholds nor a bias of -inf leave a pair out."""
    for dtype in (torch.float32, torch.bfloat16):
        for what, block in masked_blocks(SHAPES["wide"], dtype, options, kind=kind):
            check_masked(engine, with_teacher(block), what)


@for_every_kind
@pytest.mark.parametrize("m, n", [(1, 1), (1, 2), (2, 1), (2, 2), (3, 2), (3, 3), (17, 13)])
def test_small_blocks(engine: str, kind: str, m: int, n: int) -> None:
    for offset in (0, -1, 1 << 40):
        for block in (
            make_block(m, n, 5, kind=kind, offset=offset),
            make_masked_block(
                m, n, 5, kind=kind, offset=offset, ids=2, margin=-0.1, key_bias=1.0,
                same_id_positive=True,
            ),
        ):  # fmt: skip
            check_masked(engine, with_teacher(block, 3), f"{offset=}")


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 100.0, 1e4, -100.0])
@pytest.mark.parametrize("shape", ["tall", "wide"])
@in_every_dtype
def test_any_scale_of_the_teacher(engine: str, dtype: str, shape: str, scale: float) -> None:
    for factors in ((False, False), (True, False), (True, True)):
        block = with_teacher(
            make_block(*SHAPES[shape], DTYPES[dtype]), scale=scale, factors=factors
        )
        check_masked(engine, block, f"{factors=}")


def test_the_widest_scales_of_ours_and_of_the_teacher(engine: str) -> None:
    """Each may need a shift for each line where the other needs one for all."""
    for ours, theirs in ((1e4, 1.0), (1.0, 1e4), (1e4, 1e4)):
        block = with_teacher(make_block(70, 90, 24, scale=ours), scale=theirs)
        check_masked(engine, block, f"{ours=}, {theirs=}")


def test_a_low_line_of_the_teacher(engine: str) -> None:
    """One line's logits are all far below the others, and a common shift would lose it."""
    for scale in (100.0, 1000.0):
        for low in ("target_x", "target_y"):
            block = with_teacher(make_block(140, 90, 8), scale=scale)
            block.target_x[:, 0] = block.target_x[:, 0].abs() + 1
            block.target_y[:, 0] = block.target_y[:, 0].abs() + 1
            getattr(block, low)[7] = 0
            getattr(block, low)[7, 0] = -1
            check_masked(engine, block, f"{low} {scale}")


def test_targets_that_are_alike(engine: str) -> None:
    """With equal targets, or a scale of 0, every expectation is the mean of t."""
    block = make_block(50, 70, 24)
    alike = with_teacher(block, scale=100.0)
    alike = alike._replace(
        target_x=alike.target_x[:1].expand(50, -1), target_y=alike.target_x[:1].expand(70, -1)
    )
    for case in (alike, with_teacher(block, scale=0.0)):
        check_masked(engine, case, "alike")
        state, t = sweep(engine, case)[0], Dense(block).t
        means = torch.cat([t.mean(1), t.mean(0)])
        torch.testing.assert_close(state[MOMENT] / state[SUM], means, rtol=0, atol=1e-6)


def test_a_peaked_teacher_picks_one_pair(engine: str) -> None:
    """Row i weighs column i alone, so its expectation is the product of the two, and a duplicate
    shares the weight."""
    x, y = make_block(40, 40, 24)[:2]
    block = make_block(40, 40, 24)._replace(
        target_x=torch.eye(40), target_y=torch.eye(40), target_scale=torch.tensor(1e4)
    )
    state = sweep(engine, block)[0]
    own = (x.double() * y.double()).sum(1)
    torch.testing.assert_close(state[MOMENT] / state[SUM], own.repeat(2), rtol=0, atol=1e-6)
    block.target_y[3] = block.target_y[8]
    state = sweep(engine, block)[0]
    shared = (x[8].double() @ (y[3] + y[8]).double()) / 2
    assert float((state[MOMENT] / state[SUM])[8]) == pytest.approx(float(shared), abs=1e-6)
    check_masked(engine, block, "peaked")


def test_targets_equal_to_the_features(engine: str) -> None:
    """Then a line's sum by the teacher is that of a softmax over all its pairs."""
    block = make_block(60, 45, 24, offset=1 << 40, bias=None)
    twin = block._replace(target_x=block.x, target_y=block.y, target_scale=block.scale)
    state = sweep(engine, twin)[0]
    own, theirs = (torch.log2(state[k + 1]) + state[k] for k in (0, 2))
    torch.testing.assert_close(own, theirs, rtol=0, atol=1e-6)


@for_every_kind
def test_a_teacher_does_not_change_other_results(engine: str, kind: str) -> None:
    block = make_masked_block(60, 45, 24, kind=kind, ids=5, same_id_positive=True)
    with_none, found = sweep(engine, block), sweep(engine, with_teacher(block))
    own = found[0][: len(with_none[0])]
    torch.testing.assert_close(own, with_none[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[1], with_none[1], rtol=0, atol=1e-7, equal_nan=True)


def test_weights_of_the_teacher_alone(engine: str) -> None:
    """The gradient of an expectation: nothing but the teacher's weights, own positives included."""
    block = with_teacher(make_block(30, 40, 24, scale=5.0))
    state, positive, kept = sweep(engine, block)
    weights = make_weights(state, 30)
    weights.coefficients[0] = 0
    weights.positive_weight.zero_()
    dense = Dense(block)
    x, y = (t.double().requires_grad_() for t in (block.x, block.y))
    p = dense.teacher.logits
    rows, columns = (weights.coefficients[1].double() * state[SUM]).split([30, 40])
    means = [(p.softmax(dim) * (x @ y.T)).sum(dim) for dim in (1, 0)]
    ((means[0] * rows).sum() + (means[1] * columns).sum()).backward()
    dx, dy, *_ = weigh_all(engine, block, state, positive, weights, kept)
    factor = float(weights.gain) * 5.0
    for found, exact in ((dx, x.grad), (dy, y.grad)):
        error = (found.double() - factor * exact).norm() / (factor * exact).norm()
        assert error < 1e-5


def test_a_nan_of_the_teacher_spoils_its_lines_alone(engine: str) -> None:
    block = with_teacher(make_block(20, 30, 8))
    block.target_x[3] = torch.nan
    state = sweep(engine, block)[0]
    assert state[:2].isfinite().all()
    assert state[SUM, 3].isnan() and state[MOMENT, 3].isnan()
    assert state[SUM, 20:].isnan().all()  # every column has a pair with row 3


@compiled_only
@for_every_kind
def test_several_tiles_and_strips(kind: str) -> None:
    for shape in ("large tiles", "large tiles, wide"):
        for scale in (20.0, 1e4):
            block = with_teacher(make_block(*SHAPES[shape], kind=kind, offset=-9), scale=scale)
            check_masked("cpu", block, f"{shape}, {scale=}")
        masked = make_masked_block(*SHAPES[shape], kind=kind, offset=-9, **OPTIONS["everything"])
        check_masked("cpu", with_teacher(masked), shape)


@compiled_only
@for_every_kind
def test_kept_products_with_a_teacher(kind: str) -> None:
    for shape in ("tall", "wide"):
        for dtype in (torch.float32, torch.bfloat16):
            block = with_teacher(make_block(*SHAPES[shape], dtype, kind=kind))
            itemsize = accumulator(dtype).itemsize
            for rows in (64, 1 << 20):
                keep = rows_to_keep(len(block.x), len(block.y), itemsize, rows * 37 * itemsize)
                check_masked("cpu", block, shape, keep)
                check_masked("cpu", with_guide(block._replace(target_scale=None)), shape, keep)


@compiled_only
def test_one_shift_serves_usual_teachers() -> None:
    block = make_block(140, 90, 24)
    assert has_one_shift(sweep("cpu", with_teacher(block, scale=50.0))[0])
    assert not has_one_shift(sweep("cpu", with_teacher(block, scale=1e4))[0])


def test_states_of_parts_merge() -> None:
    """A ring merges the states of columns with the sums of t."""
    block = with_teacher(make_block(40, 30, 8, offset=1 << 40), scale=1e3)
    whole = sweep("torch", block)[0][-3:, 40:]
    parts = [
        block._replace(x=block.x[rows], target_x=block.target_x[rows])
        for rows in (slice(0, 13), slice(13, 40))
    ]
    states = [sweep("torch", part)[0][-3:, len(part.x) :].contiguous() for part in parts]
    torch_engine.merge(states[0][0], states[0][1:], states[1][0], states[1][1:])
    assert torch.equal(states[0][0], whole[0])
    torch.testing.assert_close(states[0], whole, rtol=1e-6, atol=0)


# ---- a guide -------------------------------------------------------------------------------------

GUIDED = ("ids", "positives by id", "key bias", "ids, margin, key bias", "everything")


@in_every_dtype
@for_every_kind
@pytest.mark.parametrize("shape", ["tall", "wide", "row", "column", "long features"])
def test_a_guide_on_plain_blocks(engine: str, shape: str, kind: str, dtype: str) -> None:
    for name, offset in OFFSETS.items():
        block = make_block(*SHAPES[shape], DTYPES[dtype], kind=kind, offset=offset)
        for width, factors in ((1, (False, False)), (24, (True, True)), (150, (False, True))):
            guided = with_guide(block, width, factors=factors)
            check_masked(engine, guided, f"positives {name}, {width=}")


@pytest.mark.parametrize("options", GUIDED)
@for_every_kind
def test_a_guide_with_other_options(engine: str, kind: str, options: str) -> None:
    for what, block in masked_blocks(SHAPES["wide"], torch.float32, options, kind=kind):
        check_masked(engine, with_guide(block, factors=(True, True)), what)


@for_every_kind
@pytest.mark.parametrize("m, n", [(1, 1), (1, 2), (2, 1), (3, 2), (17, 13)])
def test_a_guide_on_small_blocks(engine: str, kind: str, m: int, n: int) -> None:
    for offset in (0, -1):
        block = make_masked_block(m, n, 5, kind=kind, offset=offset)
        check_masked(engine, with_guide(block, 3), f"{offset=}")


def test_the_guide_decides_in_the_place_of_our_products(engine: str) -> None:
    block = with_guide(make_block(30, 40, 24))
    own = block._replace(
        target_x=None, target_y=None, target_factor_x=None, target_factor_y=None, guided=False
    )
    assert not torch.equal(sweep(engine, block)[0], sweep(engine, own)[0])
    twin = block._replace(target_x=block.x, target_y=block.y)
    torch.testing.assert_close(sweep(engine, twin)[0], sweep(engine, own)[0], rtol=1e-6, atol=1e-6)


@for_every_kind
def test_our_own_shift_may_be_each_lines_under_a_guide(engine: str, kind: str) -> None:
    block = with_guide(make_block(70, 90, 24, kind=kind, scale=1e3))
    check_masked(engine, block, "a wide scale")
