"""Targets in the GPU engines: a teacher's weights, and a guide, on blocks of several tiles."""

import pytest
import torch
from support.block_cases import for_every_kind, in_every_dtype
from support.block_operators import sweep
from support.dense_block import DTYPES, make_block
from support.dense_truth import Dense, has_one_shift
from support.gpu_engine_case import check, several_tiles, small_chunks, tf32_products
from support.masked_block import make_masked_block
from support.masked_cases import OPTIONS
from support.target_cases import with_guide, with_teacher

from fastclip.engine import arithmetic

pytestmark = pytest.mark.usefixtures("on_the_device")

EVERYTHING = OPTIONS["everything"]


@in_every_dtype
@for_every_kind
def test_a_teacher(gpu_engine: str, kind: str, dtype: str) -> None:
    if dtype == "float64":
        pytest.skip("float64 goes to the plain PyTorch engine")
    m, n = several_tiles(gpu_engine)
    for width, offset in ((24, 0), (37, -9)):
        block = make_block(m, n, 24, DTYPES[dtype], kind=kind, offset=offset)
        check(gpu_engine, with_teacher(block, width), what=f"{width=}")


@for_every_kind
@pytest.mark.parametrize("options", ["positives by id", "ids, margin, key bias", "everything"])
def test_a_teacher_with_other_options(gpu_engine: str, kind: str, options: str) -> None:
    m, n = several_tiles(gpu_engine)
    for factors in ((False, False), (True, True)):
        block = make_masked_block(m, n, 24, kind=kind, offset=-9, **OPTIONS[options])
        check(gpu_engine, with_teacher(block, factors=factors), what=f"{factors=}")


@pytest.mark.parametrize("scale", [0.0, 100.0, 1e4, -100.0])
def test_any_scale_of_the_teacher(gpu_engine: str, scale: float) -> None:
    for dtype in (torch.float32, torch.float16):
        block = make_block(*several_tiles(gpu_engine), 24, dtype, factors=(True, False))
        check(gpu_engine, with_teacher(block, scale=scale, factors=(False, True)), what=str(dtype))


@for_every_kind
def test_a_guide(gpu_engine: str, kind: str) -> None:
    m, n = several_tiles(gpu_engine)
    for dtype in (torch.float32, torch.bfloat16):
        for name in ("ids", "everything"):
            block = make_masked_block(m, n, 24, dtype, kind=kind, **OPTIONS[name])
            block = with_guide(block, 37, factors=(True, True))
            check(gpu_engine, block, what=f"{dtype}, {name}")
            masks = [Dense(b).by_row for b in (block, block._replace(guided=False))]
            assert (masks[0] != masks[1]).float().mean() > 0.1, "the guide decides"


def test_a_guide_beyond_one_shift(gpu_engine: str) -> None:
    block = make_block(*several_tiles(gpu_engine), 24, scale=1e3, offset=-9)
    for factors in ((True, False), (False, True)):
        guided = with_guide(block, 37, factors=factors)
        assert not has_one_shift(check(gpu_engine, guided, what=f"{factors=}"))


@for_every_kind
@pytest.mark.parametrize("m, n", [(1, 1), (1, 2), (3, 2), (17, 13)])
def test_small_blocks(gpu_engine: str, kind: str, m: int, n: int) -> None:
    for offset in (0, -1):
        block = make_masked_block(m, n, 5, kind=kind, offset=offset, **EVERYTHING)
        check(gpu_engine, with_teacher(block, 3), what=f"a teacher, {offset=}")
        check(gpu_engine, with_guide(block, 3), what=f"a guide, {offset=}")


@for_every_kind
def test_several_chunks(gpu_engine: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = make_masked_block(*several_tiles(gpu_engine), 24, kind=kind, **EVERYTHING)
    with small_chunks(gpu_engine, monkeypatch):
        for scale in (20.0, 1e4):
            check(gpu_engine, with_teacher(block, 37, scale=scale), what=f"{scale=}")
        check(gpu_engine, with_guide(block, 37), what="a guide")


def test_other_arithmetics(gpu_engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in tf32 and in parts of bf16."""
    block = with_teacher(make_block(*several_tiles(gpu_engine), 24), 37)
    exact = Dense(block).teacher.expectations
    with tf32_products():
        state, _, _ = sweep(gpu_engine, block)
    error = (state[-1] / state[-2] - exact).abs().max()
    assert 1e-6 < error < 2e-2  # the operands are rounded, and nothing else goes wrong
    monkeypatch.setattr(arithmetic, "fp32", lambda: "split")
    check(gpu_engine, block, what="split")


def test_a_nan_of_the_teacher_spoils_its_lines_alone(gpu_engine: str) -> None:
    m, n = several_tiles(gpu_engine)
    block = with_teacher(make_block(m, n, 8))
    block.target_x[3] = torch.nan
    state = sweep(gpu_engine, block)[0]
    assert state[:2].isfinite().all() and state[-1, m:].isnan().all()
    rows = state[-2, :m]
    assert rows[torch.arange(m) != 3].isfinite().all() and rows[3].isnan()
