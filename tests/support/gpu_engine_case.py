"""Blocks for the tests of a GPU engine: their sizes, and a check through both sweeps.

A test that takes `gpu_engine` runs for the Triton engine and for the CUDA one. Without a card the
Triton engine is interpreted, which takes milliseconds a tile, and the CUDA engine is emulated:
blocks are small, tiles and chunks smaller. On a card the same tests take blocks of as many tiles.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from conftest import DEVICE
from support import cuda_case
from support.block_operators import make_weights, operator, sweep, weigh_all
from support.dense_block import Block, Weights
from support.dense_truth import Dense, assert_gradients, assert_states
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fastclip

# ---- sizes of blocks in tiles --------------------------------------------------------------------
# A card's tiles are up to 128 x 256 or 256 x 128 pairs, interpreted ones 32 x 32, emulated ones
# 64 x 256. Only this section knows.

ON_A_CARD = DEVICE.type == "cuda"
EDGE = 256 if ON_A_CARD else 32


def enlarged(*sizes: int) -> tuple[int, ...]:
    """Scales sizes from the interpreter's tiles to the card's, with as many edges and corners."""
    return tuple(size * EDGE // 32 for size in sizes)


def tile_of(engine: str) -> tuple[int, int]:
    """Returns rows and columns that are multiples of every tile of the engine."""
    return (64, 256) if engine == "cuda" and not ON_A_CARD else (EDGE, EDGE)


def several_tiles(engine: str) -> tuple[int, int]:
    """Returns M and N of at least three rows and two columns of tiles, the last ones cut off."""
    if ON_A_CARD:
        return 700, 900
    return (70, 60) if engine == "triton" else (150, 600)


def many_tiles(engine: str) -> tuple[int, int]:
    """Returns M and N. On a card they have more than two tiles for each processor, so that a
    persistent program takes a second and a third one, and more rows of tiles than share columns in
    L2."""
    return (2700, 3500) if ON_A_CARD else several_tiles(engine)


def depth(wide: int) -> int:
    """Returns D: as given on a card, whose products go along D in steps of at most 64. The
    interpreter takes milliseconds for a step of 32: it gets few steps, with the same remainder."""
    return wide if ON_A_CARD else 32 * (wide > 32) + wide % 64


@contextmanager
def tf32_products() -> Iterator[None]:
    """Within this context fp32 products may round their operands to tf32: a user's setting."""
    settings = torch.backends.cuda.matmul
    before, settings.fp32_precision = settings.fp32_precision, "tf32"
    try:
        yield
    finally:
        settings.fp32_precision = before


# ---- a block through both sweeps -----------------------------------------------------------------


def prepare(engine: str, device: torch.device, patch: pytest.MonkeyPatch) -> None:
    """Makes the engine take tensors on the device; skips the test if it cannot."""
    if engine == "cuda" and device.type == "cpu":
        if reason := cuda_case.why_not():
            pytest.skip(f"the CUDA engine cannot be emulated: {reason}")
        cuda_case.on_cpu_tensors(patch)
    elif (reason := fastclip.backends()[engine]) != "available":
        pytest.skip(f"the engine {engine!r} cannot run: {reason}")
    if engine == "triton":
        from fastclip.triton_kernels import plan

        # Blocks are treated as large ones; small blocks have tests of their own.
        patch.setattr(plan, "SMALL_PAIRS", 0)


def check(
    engine: str,
    block: Block,
    keep: int = 0,
    bound: Tensor | None = None,
    projects: tuple[bool, ...] = (True,),
    needs: tuple[bool, bool] = (True, True),
    what: str = "",
) -> Tensor:
    """Checks both sweeps of a block against the truth; returns its state."""
    dense = Dense(block)
    state, positive, kept = sweep(engine, block, keep, bound)
    assert_states(dense, state, positive, what)
    weights = make_weights(state, dense.m)
    w = dense.activations(state, weights.coefficients)
    for project in projects:
        results = weigh_all(engine, block, state, positive, weights, kept, needs, project)
        exact = dense.gradients(w, weights, project)
        assert_gradients(dense, exact, results, needs, what, half_products=True)
    return state


def check_in_one_go(
    engine: str,
    block: Block,
    needs: tuple[bool, bool] = (True, True),
    project: bool = True,
    what: str = "",
) -> None:
    """Checks both sweeps of a block, done in one go, against the truth."""
    dense = Dense(block)
    gain = torch.tensor(0.3, dtype=torch.float64)
    state, positive, *results = operator("sweep_and_weigh", engine)(
        *block.arguments, gain, *needs, project
    )
    assert_states(dense, state, positive, what)
    s = dense.scale * dense.positive + dense.bias
    halves = torch.full((dense.m + dense.n,), 0.5, dtype=torch.float64)
    weights = Weights(halves, -torch.sigmoid(-s).nan_to_num(0), gain)
    exact = dense.gradients(dense.activations(state, halves), weights, project)
    assert results[0].dtype == results[1].dtype == torch.float32
    assert_gradients(dense, exact, tuple(results), needs, what, half_products=True)


@contextmanager
def small_chunks(
    engine: str, patch: pytest.MonkeyPatch, rows: int = EDGE, columns: int = EDGE
) -> Iterator[None]:
    """Within this context every block has several chunks, of rows and of columns."""
    if engine == "cuda":
        with cuda_case.chunks(rows, columns):
            yield
        return
    from fastclip.triton_kernels import plan

    with patch.context() as context:
        context.setattr(plan, "PARTIAL_BYTES", 1)
        context.setattr(plan, "WEIGHT_BYTES", 1)
        context.setattr(plan, "ROW_UNIT", rows)
        context.setattr(plan, "WEIGHT_COLUMNS", columns)
        yield


@contextmanager
def library_products() -> Iterator[list[str]]:
    """Lists the products that torch makes within this context; the list is filled at its end."""
    products: list[str] = []
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        yield products
    products += [event.name for event in recorded.events() if event.name in PRODUCTS]


PRODUCTS = ("aten::mm", "aten::addmm")
