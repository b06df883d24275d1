"""The GPU engines' operators, interpreted or emulated, are right on any block in every dtype.

Blocks have edges, corners and whole tiles; positives on, beside and outside the diagonal; factors
on either tower; some rows kept; several chunks. The truth is a dense float64 computation.
"""

import pytest
import torch
from conftest import DEVICE
from support.block_operators import make_weights, operator, sweep, weigh
from support.dense_block import DENSE_KINDS, DTYPES, KINDS, Block, Weights, make_block
from support.dense_truth import Dense, assert_gradients
from support.gpu_engine_case import (
    EDGE,
    check,
    check_in_one_go,
    enlarged,
    library_products,
    prepare,
    small_chunks,
    tf32_products,
    tile_of,
)
from support.triton_case import needs_engine

from fastclip.engine import kept as kept_plans
from fastclip.engine.block import Block as Arguments
from fastclip.engine.kept import KEPT_BY

pytestmark = pytest.mark.usefixtures("on_the_device")


def shapes(rows: int, columns: int) -> dict[str, tuple[int, int, int]]:
    """Returns M, N and D, named after the way that tiles of rows x columns divide the block."""
    return {
        "whole tiles": (rows, 2 * columns, 64),
        "one more": (rows + 1, 2 * columns + 1, 7),
        "one less": (2 * rows - 1, columns - 1, 96),
        "row": (1, columns + 8, 1),
        "column": (columns + 8, 1, 33),
    }


GPU_DTYPES = {name: DTYPES[name] for name in ("float32", "bfloat16", "float16")}
FACTORS = ((False, False), (True, False), (False, True), (True, True))


@pytest.mark.parametrize("shape", shapes(0, 0))
@pytest.mark.parametrize("dtype", GPU_DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_any_block(gpu_engine: str, kind: str, dtype: str, shape: str) -> None:
    """There are three offsets, each with its factors."""
    m, n, d = shapes(*tile_of(gpu_engine))[shape]
    for offset, factors in zip((0, -5, n - 1 - m // 4), FACTORS[1:], strict=True):
        block = make_block(m, n, d, GPU_DTYPES[dtype], kind=kind, offset=offset, factors=factors)
        check(gpu_engine, block, what=f"{offset=}, {factors=}")


@pytest.mark.parametrize("beyond", [0, 1 << 40])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_without_positives(gpu_engine: str, kind: str, side: str, beyond: int) -> None:
    m, n = enlarged(33, 70)
    offset = n + beyond if side == "right" else -m - beyond
    block = make_block(m, n, 8, kind=kind, offset=offset)
    check(gpu_engine, block)
    assert sweep(gpu_engine, block)[1].isnan().all()


@pytest.mark.parametrize("dtype", GPU_DTYPES)
def test_both_sweeps_in_one_go(
    gpu_engine: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for factors in FACTORS:
        block = make_block(
            *enlarged(40, 65), 24, GPU_DTYPES[dtype], kind="sigmoid", offset=-5, factors=factors,
            bias=-10.0,
        )  # fmt: skip
        check_in_one_go(gpu_engine, block, what=f"{factors=}")
    with small_chunks(gpu_engine, monkeypatch):
        check_in_one_go(gpu_engine, block, what=f"{factors=}, chunks")


def test_gradients_before_and_after_the_normalisation(gpu_engine: str) -> None:
    for kind in KINDS:
        block = make_block(*enlarged(33, 40), 24, kind=kind, factors=(True, True))
        check(gpu_engine, block, projects=(False, True))
    check_in_one_go(gpu_engine, block._replace(kind="sigmoid"), project=False)


@pytest.mark.parametrize("needs", [(x, y) for x in (False, True) for y in (False, True)])
def test_only_what_is_needed(gpu_engine: str, needs: tuple[bool, bool]) -> None:
    m, n = enlarged(33, 40)
    block, sigmoid, hinge = (
        make_block(m, n, 8, kind=kind, factors=(True, False))
        for kind in ("softmax", "sigmoid", "hinge")
    )
    for each in (block, hinge):
        check(gpu_engine, each, needs=needs)
    check_in_one_go(gpu_engine, sigmoid, needs)
    # The CUDA engine's logits are a product by torch, too.
    expected = sum(needs) + (gpu_engine == "cuda")
    state, positive, _ = sweep(gpu_engine, block)
    weights, one = make_weights(state, m), torch.ones(())
    with library_products() as products:
        weigh(gpu_engine, block, state, positive, weights, needs=needs)
    assert len(products) == expected
    with library_products() as products:
        operator("sweep_and_weigh", gpu_engine)(*sigmoid.arguments, one, *needs, False)
    assert len(products) == expected


@pytest.mark.parametrize("dtype", GPU_DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_change_nothing(
    gpu_engine: str, kind: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks are single tiles, on either side of the numerical switch."""
    has_switch = DENSE_KINDS[kind].has_shift and dtype == "bfloat16"
    for scale in (14.3, 1e4) if has_switch else (14.3,):
        block = make_block(
            *enlarged(70, 67), 16, GPU_DTYPES[dtype], kind=kind, offset=3, factors=(True, True),
            scale=scale,
        )  # fmt: skip
        with small_chunks(gpu_engine, monkeypatch):
            check(gpu_engine, block, what=f"{scale=}")
            if dtype == "bfloat16":
                check(gpu_engine, block, *enlarged(48), what=f"{scale=}, kept rows")


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_several_tiles(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the CUDA engine the last chunks are narrower, and their rows begin anywhere."""
    prepare("cuda", DEVICE, monkeypatch)
    block = make_block(300, 701, 8, kind=kind, offset=150, factors=(True, False))
    with small_chunks("cuda", monkeypatch, 130, 300):
        for keep in (0, 160):
            check("cuda", block, keep)
        if DENSE_KINDS[kind].is_linear:
            check_in_one_go("cuda", block)


@pytest.mark.parametrize("shape", [(70, 40), (40, 70)], ids=["tall", "wide"])
@pytest.mark.parametrize("kind", KINDS)
def test_kept_products(gpu_engine: str, kind: str, shape: tuple[int, int]) -> None:
    """The second sweep reads what was kept: some rows, all of them, or all and padding."""
    m, n = enlarged(*shape)
    block = make_block(m, n, 12, torch.bfloat16, kind=kind, offset=-3, factors=(True, True))
    for budget in (4 * EDGE * min(m, n), 1 << 40):
        keep = KEPT_BY[gpu_engine].keep(Arguments.of(block.arguments)[0], budget)
        if keep == 0:
            assert gpu_engine == "triton" and DENSE_KINDS[kind].has_levels
            # Statistics that a caller asks for all the same are not used.
            check(gpu_engine, block, 16)
            return
        check(gpu_engine, block, keep, what=f"{keep} rows")
        state, positive, kept = sweep(gpu_engine, block, keep)
        assert 0 < kept.nbytes <= budget and KEPT_BY[gpu_engine].made(block.x, block.y, kept)
        weights = make_weights(state, m)
        before = weigh(gpu_engine, block, state, positive, weights, kept)
        # The bytes before kept weights say if they may be read: those stay.
        kept[kept_plans.Weights.header(m, n) if kept.dtype == torch.uint8 else 0 :] = 0
        after = weigh(gpu_engine, block, state, positive, weights, kept)
        assert not torch.allclose(before[0], after[0])


def test_any_strides(gpu_engine: str) -> None:
    """Features may be rows of a wider tensor, transposed, every second number, one expanded row, or
    begin anywhere in memory."""
    m, n = enlarged(40, 33)
    d = 16
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
        check(gpu_engine, block._replace(x=x))
        check(gpu_engine, block._replace(x=block.y, y=x))


@pytest.mark.parametrize("dtype_x, dtype_y", [("float16", "float32"), ("bfloat16", "float64")])
def test_gradients_in_any_dtype(gpu_engine: str, dtype_x: str, dtype_y: str) -> None:
    dtypes = (DTYPES[dtype_x], DTYPES[dtype_y])
    block = make_block(*enlarged(33, 40), 24, factors=(True, False))
    dense = Dense(block)
    state, positive, _ = sweep(gpu_engine, block)
    weights = make_weights(state, dense.m)
    exact = dense.gradients(dense.activations(state, weights.coefficients), weights, True)
    results = weigh(gpu_engine, block, state, positive, weights, project=True, dtypes=dtypes)
    assert (results[0].dtype, results[1].dtype) == dtypes
    # A float64 gradient is computed in float32.
    results = (results[0], results[1].float(), results[2])
    assert_gradients(dense, exact, results)


@pytest.mark.parametrize("out", GPU_DTYPES)
def test_features_shorter_than_epsilon_are_not_projected(gpu_engine: str, out: str) -> None:
    """Their norm was clamped. In fp16 their gradient, of order 1e12, is 0 instead of infinite."""
    block = make_block(*enlarged(40, 33), 24, kind="sigmoid", factors=(True, True))
    block.x[0] = 0
    block.x[7] *= 1e-13 / block.x[7].norm()
    block.factor_x[[0, 7]] = 1e12
    dense = Dense(block)
    state, positive, _ = sweep(gpu_engine, block)
    weights = make_weights(state, dense.m, gain=1e-12)  # otherwise these two rows hide all others
    exact = dense.gradients(dense.activations(state, weights.coefficients), weights, True)
    dtypes = (DTYPES[out], DTYPES[out])
    results = weigh(gpu_engine, block, state, positive, weights, project=True, dtypes=dtypes)
    if out == "float16":
        assert not results[0][[0, 7]].any()
    else:
        assert_gradients(dense, exact, results)


def test_the_plain_engine_takes_float64(gpu_engine: str) -> None:
    block = make_block(9, 7, 4, torch.float64)
    for one, other in zip(sweep(gpu_engine, block), sweep("torch", block), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_run_to_run_bit_for_bit(gpu_engine: str) -> None:
    m, n = enlarged(70, 67)
    block = make_block(m, n, 16, torch.bfloat16, factors=(True, True))
    state, positive, _ = sweep(gpu_engine, block)
    weights = make_weights(state, m)
    first = (state, positive, *weigh(gpu_engine, block, state, positive, weights))
    state, positive, _ = sweep(gpu_engine, block)
    second = (state, positive, *weigh(gpu_engine, block, state, positive, weights))
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_tf32_rounds_its_operands_to_nearest(gpu_engine: str) -> None:
    """If the user allows tf32, products are those of rounded features; nothing else changes."""
    m, n = enlarged(40, 33)
    block = make_block(m, n, 24, scale=1.0)
    bits = [t.view(torch.int32) for t in block[:2]]
    x, y = (((b + 0xFFF + ((b >> 13) & 1)) & -8192).view(torch.float32) for b in bits)
    with tf32_products():
        coarse = sweep(gpu_engine, block)[1]
    exact = sweep(gpu_engine, block._replace(x=x, y=y))[1]
    # Tensor cores sum in another order; rounding to tf32 is a hundred times as coarse.
    tolerance = 2e-6 if coarse.is_cuda else 0.0
    torch.testing.assert_close(coarse, exact, rtol=0, atol=tolerance, equal_nan=True)
    assert not torch.equal(coarse[:n], sweep(gpu_engine, block)[1][:n])


def test_tf32_rounds_its_weights_to_nearest(gpu_engine: str) -> None:
    """With a single column of ones, dx equals the weights that the product took."""
    x = torch.linspace(-3, 3, EDGE + 8)[:, None]
    block = Block(x, torch.ones(1, 1), None, None, torch.ones(()), None, 1 << 40, "sigmoid")
    half = torch.full((len(x) + 1,), 0.5, dtype=torch.float64)
    weights = Weights(half, half[1:], torch.ones(()))
    with tf32_products():
        state, positive, _ = sweep(gpu_engine, block)
        dx = weigh(gpu_engine, block, state, positive, weights)[0][:, 0]
    held = (x.view(torch.int32) + 0xFFF + ((x.view(torch.int32) >> 13) & 1)) & -8192
    exact = torch.sigmoid(held.view(torch.float32).double())[:, 0]
    assert not (dx.view(torch.int32) & 8191).any()
    unit = torch.exp2(torch.floor(torch.log2(exact)) - 10)
    assert ((dx.double() - exact).abs() <= 0.501 * unit).all()


@needs_engine
@pytest.mark.parametrize("keep", [1, 16])
def test_a_budget_for_no_whole_row_keeps_nothing(
    keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`keep` counts rows along the longer side: in a wide block it may stand for no whole row."""
    prepare("triton", DEVICE, monkeypatch)
    m, n = enlarged(40, 800)
    block = make_block(m, n, 12, torch.bfloat16)
    assert sweep("triton", block, keep)[2].numel() == 0
    check("triton", block, keep)


@needs_engine
def test_kept_sums_that_overflow_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exponentials may reach 2^100, and t of long features any size."""
    prepare("triton", DEVICE, monkeypatch)
    m, n = enlarged(40, 70)
    x = torch.ones(m, 8)
    block = make_block(m, n, 8, scale=1e-14)._replace(x=1e8 * x, y=1e8 * torch.ones(n, 8))
    keep = KEPT_BY["triton"].keep(Arguments.of(block.arguments)[0], 1 << 30)
    check("triton", block, keep)
