"""Masks: pairs excluded by equal ids or thresholds, biases of columns, positives by id.

The truth is a dense float64 computation with the same masks.
"""

import math

import pytest
import torch
from support.block_cases import SHAPES, compiled_only, for_every_kind, in_every_dtype
from support.block_operators import make_weights, sweep, weigh_all
from support.dense_block import DENSE_KINDS, DTYPES, accumulator
from support.dense_truth import Dense, has_one_shift
from support.masked_block import make_masked_block
from support.masked_cases import (
    LOW_POSITIVE,
    OPTIONS,
    check_masked,
    low_positive_by_id,
    masked_blocks,
)

from fastclip.engine.kept import rows_to_keep

pytestmark = pytest.mark.usefixtures("on_the_device", "chunks_of_plain_pytorch")

for_every_option = pytest.mark.parametrize("options", OPTIONS)


@for_every_option
@in_every_dtype
@for_every_kind
@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_masked_blocks(engine: str, shape: str, kind: str, dtype: str, options: str) -> None:
    for what, block in masked_blocks(SHAPES[shape], DTYPES[dtype], options, kind=kind):
        check_masked(engine, block, what)


@for_every_kind
@pytest.mark.parametrize("shape", ["row", "column", "long features"])
def test_awkward_shapes(engine: str, shape: str, kind: str) -> None:
    for options in OPTIONS:
        for what, block in masked_blocks(SHAPES[shape], torch.float32, options, kind=kind):
            check_masked(engine, block, f"{options}, {what}")


@compiled_only
@for_every_kind
@pytest.mark.parametrize("shape", ["large tiles", "large tiles, wide"])
def test_several_tiles_and_blocks_of_rows(shape: str, kind: str) -> None:
    for options in ("everything", "ids, margin, key bias"):
        block = make_masked_block(*SHAPES[shape], kind=kind, offset=-9, **OPTIONS[options])
        check_masked("cpu", block, options)


@for_every_kind
def test_factors(engine: str, kind: str) -> None:
    """Thresholds apply to the products of normalised features."""
    for options in ("margin", "everything"):
        for what, block in masked_blocks(
            SHAPES["tall"], torch.float32, options, kind=kind, factors=(True, True)
        ):
            check_masked(engine, block, f"{options}, {what}", project=True)


@for_every_option
@for_every_kind
@pytest.mark.parametrize("scale", [1000.0, -300.0])
def test_one_shift_is_not_enough(engine: str, kind: str, options: str, scale: float) -> None:
    """Each line has its own shifts, one for negatives and one for positives by id."""
    shape = SHAPES["wide"]
    for what, block in masked_blocks(shape, torch.float32, options, kind=kind, scale=scale):
        check_masked(engine, block, what)
    if DENSE_KINDS[kind].has_shift and options != "one id":  # one id leaves no negatives
        assert not has_one_shift(sweep(engine, block)[0])


def test_a_low_positive_by_id_gets_its_own_shift(engine: str) -> None:
    """One positive by id is far below all other pairs."""
    for shape in ("tall", "wide"):
        block = low_positive_by_id(make_masked_block(*SHAPES[shape], scale=60.0, **LOW_POSITIVE))
        check_masked(engine, block, shape)
        assert not has_one_shift(sweep(engine, block)[0])


@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_positives_by_id_without_any_negative(engine: str, shape: str) -> None:
    """All lines have the shift 0 for negatives, and shifts of their own for positives."""
    block = make_masked_block(*SHAPES[shape], scale=1000.0, ids=1, same_id_positive=True)
    check_masked(engine, block, shape)
    shifts = sweep(engine, block)[0][::2]
    assert not shifts[0].any() and len(shifts[1].unique()) > 1


@compiled_only
def test_a_line_without_pairs_keeps_the_common_shift() -> None:
    """A line without pairs has sum 0, which does not mean that the common shift was too coarse."""
    for options in (OPTIONS["one id"], OPTIONS["positives by id"], OPTIONS["key bias"]):
        block = make_masked_block(40, 30, 8, **options)
        assert has_one_shift(sweep("cpu", block)[0])


def test_a_bias_far_from_the_others(engine: str) -> None:
    """The biases make one column dominate all others, and another vanish."""
    for far in (300.0, -300.0, 1e4):
        block = make_masked_block(30, 40, 8, key_bias=1.0)
        block.key_bias[3] = far
        check_masked(engine, block, f"{far=}")


def test_a_common_bias_moves_the_statistic_by_itself(engine: str) -> None:
    """Exact to the last digits in compiled engines: the shift takes up a bias's integral part."""
    block = make_masked_block(30, 40, 8, key_bias=0.0, scale=100.0)
    finite = block.key_bias > -math.inf
    block.key_bias[~finite] = 0.0

    def statistic(bias: float) -> torch.Tensor:
        moved = block._replace(key_bias=block.key_bias + bias)
        shift, sums = sweep(engine, moved)[0]
        return torch.log2(sums) + shift

    atol = 5e-7 if engine == "cpu" else 2e-5  # other engines round the distance from the shift
    for bias in (0.3, -11.7, 40.1):
        difference = statistic(bias) - statistic(0.0)
        torch.testing.assert_close(
            difference, torch.full_like(difference, bias / math.log(2)), rtol=0, atol=atol
        )


def test_a_pair_exactly_at_the_threshold_is_a_negative(engine: str) -> None:
    block = make_masked_block(12, 12, 8, torch.float64)
    # Products of powers of two are exact.
    block = block._replace(
        x=torch.exp2(block.x.mul(4).round()), y=torch.exp2(block.y.mul(4).round())
    )
    t = Dense(block).t.fill_diagonal_(0)
    at = block._replace(threshold_x=t.amax(1), threshold_y=t.amax(0))
    assert torch.equal(sweep(engine, at)[0], sweep(engine, block)[0])
    below = at._replace(threshold_x=torch.nextafter(t.amax(1), torch.tensor(0.0, dtype=t.dtype)))
    assert not torch.equal(sweep(engine, below)[0], sweep(engine, block)[0])


@compiled_only
@for_every_option
@for_every_kind
def test_kept_products(kind: str, options: str) -> None:
    """The second sweep computes the masks again, from kept products."""
    for shape in ("tall", "wide"):
        for dtype in (torch.float32, torch.bfloat16):
            for what, block in masked_blocks(SHAPES[shape], dtype, options, kind=kind):
                itemsize = accumulator(dtype).itemsize
                keep = rows_to_keep(len(block.x), len(block.y), itemsize, 70 * 48 * itemsize)
                assert keep > 0
                check_masked("cpu", block, what, keep)


@for_every_kind
def test_a_nan_spoils_only_its_lines(engine: str, kind: str) -> None:
    """A threshold does not exclude a NaN; an equal id does."""
    block = make_masked_block(20, 30, 8, kind=kind, ids=4, margin=0.1)
    block.x[3] = torch.nan
    state = sweep(engine, block)[0]
    row = state[1, :20]
    assert row[3].isnan()
    if not DENSE_KINDS[kind].has_shift:  # lines with shifts share a bound, which the NaN spoils
        assert row[torch.arange(20) != 3].isfinite().all()
        hidden = (block.ids_y == block.ids_x[3]) | (torch.arange(30) == 3 + block.offset)
        assert torch.equal(state[1, 20:].isnan(), ~hidden)


def test_gradients_that_are_not_requested_have_no_rows(engine: str) -> None:
    block = make_masked_block(20, 30, 8, ids=4, key_bias=1.0)
    state, positive, _ = sweep(engine, block)
    weights = make_weights(state, 20)
    results = weigh_all(engine, block, state, positive, weights, needs=(False, True))
    assert [len(t) for t in results] == [0, 30, 2, 30]
    without = weigh_all(
        engine, block._replace(key_bias=None), state, positive, weights, needs=(True, False)
    )
    assert [len(t) for t in without] == [20, 0, 2, 0]
