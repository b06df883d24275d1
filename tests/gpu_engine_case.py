"""What every test of a GPU engine asks for: a block checked through both sweeps.

A test that takes `gpu_engine` runs for the Triton engine and for the CUDA one. Without a card the
first is interpreted, milliseconds for a tile, and the second emulated: blocks are small, tiles and
chunks smaller.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import cuda_case
import pytest
import torch
from dense_block import (
    Block,
    Dense,
    Weights,
    assert_gradients,
    assert_states,
    make_weights,
    operator,
    sweep,
    weigh,
)
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fastclip

GPU_ENGINES = ("triton", "cuda")


def prepare(engine: str, device: torch.device, patch: pytest.MonkeyPatch) -> None:
    """Makes its operators, and the losses on it, take tensors on the device; skips if it cannot."""
    if engine == "cuda" and device.type == "cpu":
        if reason := cuda_case.why_not():
            pytest.skip(f"the CUDA engine cannot be emulated: {reason}")
        cuda_case.on_cpu_tensors(patch)
    elif (reason := fastclip.backends()[engine]) != "available":
        pytest.skip(f"the engine {engine!r} cannot run: {reason}")


def check(
    engine: str,
    block: Block,
    keep: int = 0,
    bound: Tensor | None = None,
    projects: tuple[bool, ...] = (True,),
    needs: tuple[bool, bool] = (True, True),
    what: str = "",
) -> Tensor:
    """The state of a block, after both sweeps agreed with the truth."""
    dense = Dense(block)
    state, positive, kept = sweep(engine, block, keep, bound)
    assert_states(dense, state, positive, what)
    weights = make_weights(state, dense.m)
    w = dense.activations(state, weights.coefficients)
    for project in projects:
        results = weigh(engine, block, state, positive, weights, kept, needs, project)
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
    dense = Dense(block)
    gain = torch.tensor(0.3, dtype=torch.float64)
    state, positive, *results = operator("sweep_and_weigh", engine)(
        *block.tensors, gain, block.offset, block.loss, *needs, project
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
    engine: str, patch: pytest.MonkeyPatch, rows: int = 32, columns: int = 32
) -> Iterator[None]:
    """Every block in several chunks, of rows and of columns."""
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
    """The products that torch makes within, filled in at the end."""
    products: list[str] = []
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        yield products
    products += [event.name for event in recorded.events() if event.name in PRODUCTS]


PRODUCTS = ("aten::mm", "aten::addmm")
