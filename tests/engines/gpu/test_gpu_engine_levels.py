"""The GPU engines take a kind with levels through whole tiles, edges and chunks."""

import pytest
import torch
from support.dense_block import make_block
from support.gpu_engine_case import check, several_tiles, small_chunks
from support.level_cases import CHECKS
from support.triton_case import needs_engine

pytestmark = pytest.mark.usefixtures("on_the_device")


@pytest.mark.parametrize("name", CHECKS)
def test_levels(gpu_engine: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    m, n = several_tiles(gpu_engine)
    with small_chunks(gpu_engine, monkeypatch):
        CHECKS[name](gpu_engine, m, n)


@needs_engine
def test_small_blocks_take_the_same_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep takes two launches, and the second one two: a level needs no shift and no flag."""
    from fastclip.triton_kernels import launch

    real, launches = launch.launch, []
    monkeypatch.setattr(
        launch,
        "launch",
        lambda kernel, *a, **b: (launches.append(kernel.__name__), real(kernel, *a, **b)),
    )
    check("triton", make_block(40, 37, 24, torch.bfloat16, kind="hinge", factors=(True, False)))
    assert launches == [
        "sweep_apart_kernel", "moments_kernel", "weigh_apart_kernel", "complete_kernel",
    ]  # fmt: skip
