"""The Triton engine's operators are right on any block, in the interpreter, in every dtype.

Shapes with edges, corners and exact tiles; positives on, beside and outside the diagonal; factors
on either tower; parts of a block kept, or cut into chunks. The truth is a dense float64 one.
"""

from collections.abc import Iterator

import pytest
import torch
from dense_block import DTYPES, LOSSES, Dense, assert_gradients, make_block, make_weights, sweep
from dense_block import weigh as run_weigh
from triton_case import check, check_in_one_go, needs_engine, small_chunks

from fastclip.ops import rows_to_keep

pytestmark = [needs_engine, pytest.mark.usefixtures("on_the_device")]

# Of tiles of 32 x 32: whole ones, one more, one less, a row, a column.
SHAPES = {
    "whole tiles": (32, 64, 64),
    "one more": (33, 65, 7),
    "one less": (63, 31, 96),
    "row": (1, 40, 1),
    "column": (40, 1, 33),
}
HALVES = {name: DTYPES[name] for name in ("float32", "bfloat16", "float16")}
FACTORS = ((False, False), (True, False), (False, True), (True, True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("loss", LOSSES)
def test_any_block(loss: str, dtype: str, shape: str) -> None:
    m, n, d = SHAPES[shape]
    for offset, factors in zip((0, -5, n - 1 - m // 4), FACTORS[1:], strict=True):
        block = make_block(m, n, d, HALVES[dtype], loss=loss, offset=offset, factors=factors)
        check(block, what=f"{offset=}, {factors=}")


@pytest.mark.parametrize("offset", [70, -33, -(1 << 40), 1 << 40])
@pytest.mark.parametrize("loss", LOSSES)
def test_blocks_without_positives(loss: str, offset: int) -> None:
    block = make_block(33, 70, 8, loss=loss, offset=offset)
    check(block)
    assert sweep("triton", block)[1].isnan().all()


@pytest.mark.parametrize("dtype", HALVES)
def test_both_sweeps_in_one_go(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for factors in FACTORS:
        block = make_block(
            40, 65, 24, HALVES[dtype], loss="sigmoid", offset=-5, factors=factors, bias=-10.0
        )
        check_in_one_go(block, what=f"{factors=}")
        with small_chunks(monkeypatch, 32):
            check_in_one_go(block, what=f"{factors=}, chunks")


@pytest.mark.parametrize("needs", [(x, y) for x in (False, True) for y in (False, True)])
def test_only_what_is_needed(needs: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    from fastclip.triton_kernels import gradients

    products = []
    multiply = gradients.accumulate
    monkeypatch.setattr(gradients, "accumulate", lambda *a: (products.append(a), multiply(*a)))
    check(make_block(33, 40, 8, factors=(True, False)), needs=needs)
    assert len(products) == sum(needs)
    check_in_one_go(make_block(33, 40, 8, loss="sigmoid"), needs)
    assert len(products) == 2 * sum(needs)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("loss", LOSSES)
def test_chunks_change_nothing(loss: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 32 and columns of 32 at a time, on either side of the switch."""
    for scale in (14.3, 1e4) if dtype == "bfloat16" else (14.3,):
        block = make_block(
            70, 67, 16, HALVES[dtype], loss=loss, offset=3, factors=(True, True), scale=scale
        )
        with small_chunks(monkeypatch, 32):
            check(block, what=f"{scale=}")


@pytest.mark.parametrize("shape", [(70, 40, 12), (40, 70, 12)], ids=["tall", "wide"])
@pytest.mark.parametrize("loss", LOSSES)
def test_kept_products(loss: str, shape: tuple[int, int, int]) -> None:
    """Some rows, all rows, more than all; they are what the second sweep reads."""
    block = make_block(*shape, torch.bfloat16, loss=loss, offset=-3, factors=(True, True))
    m, n, _ = shape
    for budget in (32 * 40 * 4, 1 << 40):
        keep = rows_to_keep(m, n, 4, budget)
        check(block, keep, what=f"{keep} rows")
        state, positive, kept = sweep("triton", block, keep)
        assert kept.shape == (keep * min(m, n),) and kept.dtype == torch.float32
        weights = make_weights(state, m)
        before = run_weigh("triton", block, state, positive, weights, kept)
        after = run_weigh("triton", block, state, positive, weights, kept.zero_())
        assert not torch.allclose(before[2], after[2])


def test_any_strides() -> None:
    """Rows of a wider tensor, transposed, every second number, one row expanded, a shifted base."""
    m, n, d = 40, 33, 16
    block = make_block(m, n, d, torch.bfloat16)
    wide = torch.full((m, 3 * d + 1), torch.nan, dtype=torch.bfloat16)
    wide[:, d : 2 * d] = block.x
    every_other = torch.full((m, 2 * d), torch.nan, dtype=torch.bfloat16)
    every_other[:, ::2] = block.x
    shifted = torch.empty(m * d + 1, dtype=torch.bfloat16)[1:].view(m, d)
    shifted.copy_(block.x)
    for x in (
        wide[:, d : 2 * d], block.x.T.contiguous().T, every_other[:, ::2],
        block.x[:1].expand(m, d), shifted,
    ):  # fmt: skip
        check(block._replace(x=x))
        check(block._replace(x=block.y, y=x))


@pytest.mark.parametrize("dtype_x, dtype_y", [("float16", "float32"), ("bfloat16", "float64")])
def test_gradients_in_any_dtype(dtype_x: str, dtype_y: str) -> None:
    dtypes = (DTYPES[dtype_x], DTYPES[dtype_y])
    block = make_block(33, 40, 24, factors=(True, False))
    dense = Dense(block)
    state, positive, _ = sweep("triton", block)
    weights = make_weights(state, dense.m)
    exact = dense.gradients(dense.activations(state, weights.coefficients), weights, True)
    results = run_weigh("triton", block, state, positive, weights, project=True, dtypes=dtypes)
    assert (results[0].dtype, results[1].dtype) == dtypes
    # float64 asked for, float32 computed.
    results = (results[0], results[1].float(), results[2])
    assert_gradients(dense, exact, results)


@pytest.mark.parametrize("out", HALVES)
def test_features_shorter_than_epsilon_are_not_projected(out: str) -> None:
    """Their norm was clamped. In fp16 their gradient of 1e12 is 0 instead of infinite."""
    block = make_block(40, 33, 24, loss="sigmoid", factors=(True, True))
    block.x[0] = 0
    block.x[7] *= 1e-13 / block.x[7].norm()
    block.factor_x[[0, 7]] = 1e12
    dense = Dense(block)
    state, positive, _ = sweep("triton", block)
    weights = make_weights(state, dense.m, gain=1e-12)  # else 1e12 drowns the other rows
    exact = dense.gradients(dense.activations(state, weights.coefficients), weights, True)
    dtypes = (DTYPES[out], DTYPES[out])
    results = run_weigh("triton", block, state, positive, weights, project=True, dtypes=dtypes)
    if out == "float16":
        assert not results[0][[0, 7]].any()
    else:
        assert_gradients(dense, exact, results)


def test_float64_is_the_plain_engines() -> None:
    block = make_block(9, 7, 4, torch.float64)
    for one, other in zip(sweep("triton", block), sweep("torch", block), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_run_to_run_bit_for_bit() -> None:
    block = make_block(70, 67, 16, torch.bfloat16, factors=(True, True))
    state, positive, _ = sweep("triton", block)
    weights = make_weights(state, 70)
    first = (state, positive, *run_weigh("triton", block, state, positive, weights))
    state, positive, _ = sweep("triton", block)
    second = (state, positive, *run_weigh("triton", block, state, positive, weights))
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def tf32() -> Iterator[None]:
    settings = torch.backends.cuda.matmul
    before, settings.fp32_precision = settings.fp32_precision, "tf32"
    yield
    settings.fp32_precision = before


def test_tf32_rounds_its_operands_to_nearest(tf32: None) -> None:
    """Where the user allows it: products are those of rounded features, nothing else changes."""
    block = make_block(40, 33, 24, scale=1.0)
    bits = [t.view(torch.int32) for t in block[:2]]
    x, y = (((b + 0xFFF + ((b >> 13) & 1)) & -8192).view(torch.float32) for b in bits)
    coarse = sweep("triton", block)[1]
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    exact = sweep("triton", block._replace(x=x, y=y))[1]
    # Tensor cores add up in an order of their own; tf32 rounds a hundred times as coarsely.
    tolerance = 2e-6 if coarse.is_cuda else 0.0
    torch.testing.assert_close(coarse, exact, rtol=0, atol=tolerance, equal_nan=True)
    assert not torch.equal(coarse[:33], sweep("triton", block)[1][:33])
