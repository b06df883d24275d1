"""The GPU engines handle pairs that do not count, positives by id and biases of columns.

A card runs `test_masked_blocks.py` for these engines, too. These tests take a few small blocks,
with plain tiles and tiles of the edges, in chunks, on both sides of the numerical switch.
"""

import contextlib
import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from support import masked_cases
from support.block_operators import make_weights, operator, relative_to, sweep
from support.dense_block import DENSE_KINDS, DTYPES, KINDS, Block
from support.dense_truth import Dense, assert_gradients, has_one_shift
from support.gpu_engine_case import enlarged, prepare, several_tiles, small_chunks, tf32_products
from support.masked_block import make_masked_block, occupied
from support.masked_cases import OFFSETS, OPTIONS, check_masked, low_positive_by_id
from support.triton_case import needs_engine

from fastclip import contrast

pytestmark = pytest.mark.usefixtures("on_the_device", "half_products")
GPU_DTYPES = ("float32", "bfloat16", "float16")
ALL = "everything"


@pytest.fixture
def half_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 weights enter products in fp16."""
    check = functools.partial(assert_gradients, half_products=True)
    monkeypatch.setattr(masked_cases, "assert_gradients", check)


def masked(engine: str, options: str, turn: int = 0, **others: object) -> Block:
    """Returns a block of another dtype, offset and normalisation at each turn. Some of its tiles
    are plain; with so few features many products exceed a threshold."""
    size = several_tiles(engine) if engine == "cuda" else enlarged(40, 100)
    dtype, offset = DTYPES[GPU_DTYPES[turn % 3]], [*OFFSETS.values()][turn % 3]
    others = {"factors": (turn % 2 == 1, turn % 4 > 1), "offset": offset, **others}
    return make_masked_block(*size, 8, dtype, **{**OPTIONS[options], **others})


@pytest.mark.parametrize("kind, options", [*zip(itertools.cycle(KINDS), OPTIONS), ("softmax", ALL)])
def test_every_option(gpu_engine: str, kind: str, options: str) -> None:
    """Each option is tested with one kind: `test_masked_blocks.py` tests all of them on a card."""
    turn = [*itertools.product(KINDS, OPTIONS)].index((kind, options))
    check_masked(gpu_engine, masked(gpu_engine, options, turn, kind=kind), "", project=turn % 2 > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks(gpu_engine: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_chunks(gpu_engine, monkeypatch):
        for turn, options in enumerate((ALL, "ids, margin, key bias")):
            check_masked(gpu_engine, masked(gpu_engine, options, turn, kind=kind), options)


@pytest.mark.parametrize(
    "options, scale", [("ids", 1e3), ("margin", -1e3), ("key bias", 1e3), (ALL, 1e3)], ids=str
)
def test_beyond_one_shift(gpu_engine: str, options: str, scale: float) -> None:
    """Pairs that a threshold takes out of a line, and positives by id, may exceed the shifts of the
    negatives by any power."""
    block = masked(gpu_engine, options, scale=scale)
    check_masked(gpu_engine, block, "")
    assert not has_one_shift(sweep(gpu_engine, block)[0])


@needs_engine
def test_tiles_of_lines_with_own_shifts_may_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels with a shift for each line may have smaller tiles: more of them, and more sums."""
    from fastclip.triton_kernels.configurations import TABLE

    prepare("triton", DEVICE, monkeypatch)
    key = ("small", "ieee", "narrow")
    smaller = TABLE["interpreter"][key]._replace(bm=16, bn=16, bk=16)
    monkeypatch.setitem(TABLE["interpreter"], key, smaller)
    for scale in (14.3, 1e3):
        check_masked("triton", masked("triton", ALL, scale=scale), f"{scale=}")


def test_a_low_positive_by_id_gets_its_own_shift(gpu_engine: str) -> None:
    """One positive by id is far below all other pairs."""
    block = low_positive_by_id(masked(gpu_engine, "positives by id", scale=60.0, offset=1 << 40))
    check_masked(gpu_engine, block, "")
    assert not has_one_shift(sweep(gpu_engine, block)[0])


def test_positives_by_id_without_any_negative(gpu_engine: str) -> None:
    """All lines have the shift 0 for negatives, and shifts of their own for positives."""
    block = masked(gpu_engine, "one id", scale=1e3, same_id_positive=True)
    check_masked(gpu_engine, block, "")
    shifts = sweep(gpu_engine, block)[0][::2]
    assert not shifts[0].any() and len(shifts[1].unique()) > 1


@pytest.mark.parametrize("options", ["one id", "positives by id", "key bias"])
def test_lines_without_pairs_need_no_shift(gpu_engine: str, options: str) -> None:
    """`occupied` tells that they are empty. Without it a sum of zero looks like pairs that one
    shift has lost, because it is too coarse."""
    block = masked(gpu_engine, options)
    if options == "positives by id":
        block.ids_x[2] = -7  # no column has this id
    assert not occupied(block).all()
    assert has_one_shift(sweep(gpu_engine, block)[0])
    blind = operator("sweep", gpu_engine)(*block.arguments, None, None, None, 0)[0]
    if options != "one id":  # with one id no line has a pair, and shifts cannot differ
        assert not has_one_shift(blind)
    assert torch.equal(blind[1::2] == 0, sweep(gpu_engine, block)[0][1::2] == 0)


@pytest.mark.parametrize("products", ["ieee", "tf32"])
def test_duplicates_of_the_positive_stay_at_margin_0(gpu_engine: str, products: str) -> None:
    """They also stay if the engine's product rounds features and that of own positives does not."""
    y = F.normalize(torch.randn(24, 48), dim=1).repeat_interleave(2, 0)
    x = F.normalize(y + 0.1 * torch.randn(48, 48), dim=1)
    with tf32_products() if products == "tf32" else contextlib.nullcontext():
        c = contrast(x, y, 30.0, false_negative_margin=0.0, backend=gpu_engine)
    assert (c.rows - c.positives > -1e-2).all()


def test_norms_that_overflow_where_no_line_has_pairs(gpu_engine: str) -> None:
    """No sum is too small, but the shift that all lines would share is not a number."""
    block = masked(gpu_engine, "one id")
    block = block._replace(x=block.x * 1e25, y=block.y * 1e25)
    state = sweep(gpu_engine, block)[0]
    assert not occupied(block).any()
    assert torch.equal(state[1], torch.zeros_like(state[1])) and state[0].isfinite().all()


def test_a_bias_far_from_the_others(gpu_engine: str) -> None:
    """One column may outweigh all others, or vanish beside them."""
    for turn, far in enumerate((300.0, -300.0, 1e4)):
        block = masked(gpu_engine, "key bias", turn)
        block.key_bias[3] = far
        check_masked(gpu_engine, block, f"{far=}")


def test_biases_that_leave_no_column(gpu_engine: str) -> None:
    block = masked(gpu_engine, "key bias")
    block.key_bias[:] = -torch.inf
    check_masked(gpu_engine, block, "")


def test_a_common_bias_moves_the_statistic_by_as_much(gpu_engine: str) -> None:
    """The integral part of the bias goes into the shift, and costs no digits."""
    block = masked(gpu_engine, "key bias", scale=100.0)
    zeros = torch.zeros_like(block.key_bias)

    def statistic(bias: float) -> torch.Tensor:
        state = sweep(gpu_engine, block._replace(key_bias=zeros + bias))[0]
        assert has_one_shift(state)
        return torch.log2(state[1]) + state[0]

    for bias in (0.3, -11.7, 4000.1):
        moved = statistic(bias) - statistic(0.0)
        expected = torch.full_like(moved, bias / math.log(2))
        torch.testing.assert_close(moved, expected, rtol=0, atol=1e-5)


def test_a_pair_at_the_threshold_counts(gpu_engine: str) -> None:
    block = masked(gpu_engine, "ids")
    # Products of powers of two are exact.
    block = block._replace(
        x=torch.exp2(block.x.mul(4).round()),
        y=torch.exp2(block.y.mul(4).round()),
        scale=torch.tensor(0.5),
    )
    dense = Dense(block)
    t = torch.where(dense.by_row, dense.t, 0).float()
    at = block._replace(threshold_x=t.amax(1), threshold_y=t.amax(0))
    assert torch.equal(sweep(gpu_engine, at)[0], sweep(gpu_engine, block)[0])
    below = at._replace(threshold_x=torch.nextafter(t.amax(1), torch.zeros(())))
    check_masked(gpu_engine, below, "")
    assert not torch.equal(sweep(gpu_engine, below)[0], sweep(gpu_engine, block)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_thresholds_do_not_hide_a_nan(gpu_engine: str, kind: str) -> None:
    block = masked(gpu_engine, "margin", kind=kind, ids=4, same_id_positive=False)
    block.x[3] = torch.nan
    row = sweep(gpu_engine, block)[0][1]
    assert row[3].isnan()
    if not DENSE_KINDS[kind].has_shift:  # lines with shifts share a bound, which the NaN spoils
        m = len(block.x)
        hidden = block.ids_y == block.ids_x[3]
        hidden[3] = True
        assert row[:3].isfinite().all() and torch.equal(row[m:].isnan(), ~hidden)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_pairs_are_not_kept(gpu_engine: str, kind: str) -> None:
    """If weights depend on more than one number of a pair, nothing is kept or used. Column sums are
    always computed anew."""
    for options in ("ids", ALL):
        check_masked(gpu_engine, masked(gpu_engine, options, 1, kind=kind), options, keep=96)
    block = masked(gpu_engine, "ids", 1, kind=kind)
    state, positive, kept = sweep(gpu_engine, block, 96)
    weights = make_weights(state, len(block.x))
    dense = Dense(block)
    exact = dense.gradients(dense.activations(state, weights.coefficients), weights)
    found = operator("weigh", gpu_engine)(
        *block.arguments, relative_to(dense.levels, state), positive, kept, weights.coefficients,
        weights.positive_weight, weights.gain, False, False, True, False, torch.float32,
        torch.float32,
    )[3]  # fmt: skip
    torch.testing.assert_close(found, exact.key_bias, rtol=1e-4, atol=1e-6)


@needs_engine
@pytest.mark.parametrize("kind", KINDS)
def test_small_blocks(kind: str) -> None:
    """The Triton engine has special kernels for small blocks, whose time goes into launches."""
    for turn, options in enumerate((ALL, "ids, margin, key bias")):
        for scale in (14.3, 1e3):
            block = make_masked_block(
                40, 37, 24, kind=kind, scale=scale, offset=-3, factors=(True, False),
                **OPTIONS[options],
            )  # fmt: skip
            check_masked("triton", block, f"{options}, {scale=}", keep=16 * turn)
