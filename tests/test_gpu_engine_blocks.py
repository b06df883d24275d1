"""The GPU engines' operators are right on any block, in every dtype: interpreted or emulated.

Shapes with edges, corners and exact tiles; positives on, beside and outside the diagonal; factors
on either tower; parts of a block kept, or cut into chunks. The truth is a dense float64 one.
"""

from collections.abc import Iterator

import pytest
import torch
from conftest import DEVICE
from dense_block import (
    DTYPES,
    LOSSES,
    Dense,
    assert_gradients,
    make_block,
    make_weights,
    operator,
    sweep,
)
from dense_block import weigh as run_weigh
from gpu_engine_case import check, check_in_one_go, library_products, prepare, small_chunks

from fastclip.kept import PLANS, Weights

pytestmark = pytest.mark.usefixtures("on_the_device")

# Whole tiles, one more, one less, a row, a column: of tiles of 32 x 32 in the interpreter, of
# 64 x 256 in the CUDA engine.
SHAPES = {
    "whole tiles": {"triton": (32, 64, 64), "cuda": (128, 512, 64)},
    "one more": {"triton": (33, 65, 7), "cuda": (65, 257, 7)},
    "one less": {"triton": (63, 31, 96), "cuda": (127, 255, 96)},
    "row": {"triton": (1, 40, 1), "cuda": (1, 300, 1)},
    "column": {"triton": (40, 1, 33), "cuda": (300, 1, 33)},
}
HALVES = {name: DTYPES[name] for name in ("float32", "bfloat16", "float16")}
FACTORS = ((False, False), (True, False), (False, True), (True, True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("loss", LOSSES)
def test_any_block(gpu_engine: str, loss: str, dtype: str, shape: str) -> None:
    m, n, d = SHAPES[shape][gpu_engine]
    for offset, factors in zip((0, -5, n - 1 - m // 4), FACTORS[1:], strict=True):
        block = make_block(m, n, d, HALVES[dtype], loss=loss, offset=offset, factors=factors)
        check(gpu_engine, block, what=f"{offset=}, {factors=}")


@pytest.mark.parametrize("offset", [70, -33, -(1 << 40), 1 << 40])
@pytest.mark.parametrize("loss", LOSSES)
def test_blocks_without_positives(gpu_engine: str, loss: str, offset: int) -> None:
    block = make_block(33, 70, 8, loss=loss, offset=offset)
    check(gpu_engine, block)
    assert sweep(gpu_engine, block)[1].isnan().all()


@pytest.mark.parametrize("dtype", HALVES)
def test_both_sweeps_in_one_go(
    gpu_engine: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for factors in FACTORS:
        block = make_block(
            40, 65, 24, HALVES[dtype], loss="sigmoid", offset=-5, factors=factors, bias=-10.0
        )
        check_in_one_go(gpu_engine, block, what=f"{factors=}")
        with small_chunks(gpu_engine, monkeypatch):
            check_in_one_go(gpu_engine, block, what=f"{factors=}, chunks")


def test_gradients_before_and_after_the_normalisation(gpu_engine: str) -> None:
    for loss in LOSSES:
        block = make_block(33, 40, 24, loss=loss, factors=(True, True))
        check(gpu_engine, block, projects=(False, True))
    check_in_one_go(gpu_engine, block, project=False)


@pytest.mark.parametrize("needs", [(x, y) for x in (False, True) for y in (False, True)])
def test_only_what_is_needed(gpu_engine: str, needs: tuple[bool, bool]) -> None:
    block, sigmoid = (make_block(33, 40, 8, loss=loss, factors=(True, False)) for loss in LOSSES)
    check(gpu_engine, block, needs=needs)
    check_in_one_go(gpu_engine, sigmoid, needs)
    # The CUDA engine's logits are torch's product, too.
    expected = sum(needs) + (gpu_engine == "cuda")
    state, positive, _ = sweep(gpu_engine, block)
    weights, one = make_weights(state, 33), torch.ones(())
    with library_products() as products:
        run_weigh(gpu_engine, block, state, positive, weights, needs=needs)
    assert len(products) == expected
    with library_products() as products:
        operator("sweep_and_weigh", gpu_engine)(
            *sigmoid.tensors, one, sigmoid.offset, "sigmoid", *needs, False
        )
    assert len(products) == expected


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("loss", LOSSES)
def test_chunks_change_nothing(
    gpu_engine: str, loss: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of 32 and columns of 32 at a time, on either side of the switch."""
    for scale in (14.3, 1e4) if dtype == "bfloat16" else (14.3,):
        block = make_block(
            70, 67, 16, HALVES[dtype], loss=loss, offset=3, factors=(True, True), scale=scale
        )
        with small_chunks(gpu_engine, monkeypatch):
            check(gpu_engine, block, what=f"{scale=}")
            if dtype == "bfloat16":
                check(gpu_engine, block, keep=48, what=f"{scale=}, kept rows")


@pytest.mark.parametrize("loss", LOSSES)
def test_chunks_of_several_tiles(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the CUDA engine's; the last ones are narrower, and of rows that begin anywhere."""
    prepare("cuda", DEVICE, monkeypatch)
    block = make_block(300, 701, 8, loss=loss, offset=150, factors=(True, False))
    with small_chunks("cuda", monkeypatch, 130, 300):
        for keep in (0, 160):
            check("cuda", block, keep)
        if loss == "sigmoid":
            check_in_one_go("cuda", block)


@pytest.mark.parametrize("shape", [(70, 40, 12), (40, 70, 12)], ids=["tall", "wide"])
@pytest.mark.parametrize("loss", LOSSES)
def test_kept_products(gpu_engine: str, loss: str, shape: tuple[int, int, int]) -> None:
    """Some rows, all rows, more than all; they are what the second sweep reads."""
    block = make_block(*shape, torch.bfloat16, loss=loss, offset=-3, factors=(True, True))
    m, n, _ = shape
    for budget in (32 * 40 * 4, 1 << 40):
        keep = PLANS[gpu_engine].keep(block.x, block.y, budget)
        check(gpu_engine, block, keep, what=f"{keep} rows")
        state, positive, kept = sweep(gpu_engine, block, keep)
        assert 0 < kept.nbytes <= budget and PLANS[gpu_engine].made(block.x, block.y, kept)
        weights = make_weights(state, m)
        before = run_weigh(gpu_engine, block, state, positive, weights, kept)
        # Of kept weights the bytes before the rows say whether they are to be read.
        kept[Weights.header(m, n) if kept.dtype == torch.uint8 else 0 :] = 0
        after = run_weigh(gpu_engine, block, state, positive, weights, kept)
        assert not torch.allclose(before[0], after[0])


def test_any_strides(gpu_engine: str) -> None:
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
        check(gpu_engine, block._replace(x=x))
        check(gpu_engine, block._replace(x=block.y, y=x))


@pytest.mark.parametrize("dtype_x, dtype_y", [("float16", "float32"), ("bfloat16", "float64")])
def test_gradients_in_any_dtype(gpu_engine: str, dtype_x: str, dtype_y: str) -> None:
    dtypes = (DTYPES[dtype_x], DTYPES[dtype_y])
    block = make_block(33, 40, 24, factors=(True, False))
    dense = Dense(block)
    state, positive, _ = sweep(gpu_engine, block)
    weights = make_weights(state, dense.m)
    exact = dense.gradients(dense.activations(state, weights.coefficients), weights, True)
    results = run_weigh(gpu_engine, block, state, positive, weights, project=True, dtypes=dtypes)
    assert (results[0].dtype, results[1].dtype) == dtypes
    # float64 asked for, float32 computed.
    results = (results[0], results[1].float(), results[2])
    assert_gradients(dense, exact, results)


@pytest.mark.parametrize("out", HALVES)
def test_features_shorter_than_epsilon_are_not_projected(gpu_engine: str, out: str) -> None:
    """Their norm was clamped. In fp16 their gradient of 1e12 is 0 instead of infinite."""
    block = make_block(40, 33, 24, loss="sigmoid", factors=(True, True))
    block.x[0] = 0
    block.x[7] *= 1e-13 / block.x[7].norm()
    block.factor_x[[0, 7]] = 1e12
    dense = Dense(block)
    state, positive, _ = sweep(gpu_engine, block)
    weights = make_weights(state, dense.m, gain=1e-12)  # else 1e12 drowns the other rows
    exact = dense.gradients(dense.activations(state, weights.coefficients), weights, True)
    dtypes = (DTYPES[out], DTYPES[out])
    results = run_weigh(gpu_engine, block, state, positive, weights, project=True, dtypes=dtypes)
    if out == "float16":
        assert not results[0][[0, 7]].any()
    else:
        assert_gradients(dense, exact, results)


def test_float64_is_the_plain_engines(gpu_engine: str) -> None:
    block = make_block(9, 7, 4, torch.float64)
    for one, other in zip(sweep(gpu_engine, block), sweep("torch", block), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_run_to_run_bit_for_bit(gpu_engine: str) -> None:
    block = make_block(70, 67, 16, torch.bfloat16, factors=(True, True))
    state, positive, _ = sweep(gpu_engine, block)
    weights = make_weights(state, 70)
    first = (state, positive, *run_weigh(gpu_engine, block, state, positive, weights))
    state, positive, _ = sweep(gpu_engine, block)
    second = (state, positive, *run_weigh(gpu_engine, block, state, positive, weights))
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def tf32() -> Iterator[None]:
    settings = torch.backends.cuda.matmul
    before, settings.fp32_precision = settings.fp32_precision, "tf32"
    yield
    settings.fp32_precision = before


def test_tf32_rounds_its_operands_to_nearest(gpu_engine: str, tf32: None) -> None:
    """Where the user allows it: products are those of rounded features, nothing else changes."""
    block = make_block(40, 33, 24, scale=1.0)
    bits = [t.view(torch.int32) for t in block[:2]]
    x, y = (((b + 0xFFF + ((b >> 13) & 1)) & -8192).view(torch.float32) for b in bits)
    coarse = sweep(gpu_engine, block)[1]
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    exact = sweep(gpu_engine, block._replace(x=x, y=y))[1]
    # Tensor cores add up in an order of their own; tf32 rounds a hundred times as coarsely.
    tolerance = 2e-6 if coarse.is_cuda else 0.0
    torch.testing.assert_close(coarse, exact, rtol=0, atol=tolerance, equal_nan=True)
    assert not torch.equal(coarse[:33], sweep(gpu_engine, block)[1][:33])
