"""Small blocks in the Triton engine: running maxima at once, masks in every tile, few launches.

The other tests of the GPU engines set `plan.SMALL_PAIRS` to 0: every block counts as large there.
"""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from support.block_cases import offsets
from support.dense_block import DTYPES, FINISHED, make_block
from support.gpu_engine_case import check, check_in_one_go
from support.triton_case import needs_engine

from fastclip.engine.block import Block as Arguments
from fastclip.engine.kept import KEPT_BY
from fastclip.loss import clip_loss, siglip_loss

pytestmark = [
    needs_engine,
    pytest.mark.usefixtures("on_the_device"),
    # Sums that overflow are computed again: only the final result counts.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
HALVES = ("bfloat16", "float16")


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Counts the launches of each kernel."""
    from fastclip.triton_kernels import launch

    real, found = launch.launch, Counter()

    def counted(kernel: Callable, *arguments: object, **constants: object) -> None:
        found[kernel.__name__] += 1
        real(kernel, *arguments, **constants)

    monkeypatch.setattr(launch, "launch", counted)
    return found


@pytest.mark.parametrize("shape", [(70, 37, 24), (37, 70, 24), (40, 1, 7), (1, 40, 7)], ids=str)
def test_lines_have_shifts_of_their_own(shape: tuple[int, int, int], launches: Counter) -> None:
    """Each offset has another dtype and other factors."""
    m, n, d = shape
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    for turn, (name, offset) in enumerate(offsets(m, n).items()):
        factors = (turn % 2 == 0, turn % 3 == 0)
        block = make_block(m, n, d, dtypes[turn % 3], offset=offset, factors=factors)
        check("triton", block, projects=(turn % 2 == 1,), what=f"positives {name}")
    assert not launches["sweep_kernel"] and not launches["shift_kernel"]


@pytest.mark.parametrize("scale", [0.0, 1e-3, 100.0, -500.0, 1e4])
def test_any_scale(scale: float) -> None:
    check("triton", make_block(40, 37, 24, torch.bfloat16, scale=scale, factors=(True, True)))


@pytest.mark.parametrize("dtype", ["float32", *HALVES])
def test_a_kind_without_a_shift(dtype: str, launches: Counter) -> None:
    """Every tile counts as one of the edges: one launch takes them all."""
    block = make_block(40, 70, 24, DTYPES[dtype], kind="sigmoid", offset=5, factors=(True, False))
    check("triton", block)
    check_in_one_go("triton", block)
    assert launches["sweep_edges_kernel"] == 1 and launches["weigh_edges_kernel"] == 2
    assert not launches["sweep_kernel"] and not launches["weigh_kernel"]


def test_nothing_is_kept(launches: Counter) -> None:
    """A small block does not use its budget: reading kept weights would take another launch."""
    for kind in FINISHED:
        block = make_block(40, 50, 24, torch.bfloat16, kind=kind)
        check("triton", block, KEPT_BY["triton"].keep(Arguments.of(block.arguments)[0], 1 << 30))
    assert not launches["weigh_kept_kernel"] and not launches["moments_kernel"]


def test_launches_of_a_step(launches: Counter) -> None:
    """Launches dominate the time of a small batch. Two library products come in addition."""
    x, y = torch.randn(2, 48, 24).to(torch.bfloat16).unbind()
    scale = torch.tensor(14.3)
    leaves = [t.requires_grad_() for t in (x, y, scale)]
    clip_loss(*leaves, backend="triton").backward()
    assert launches == {
        "sweep_apart_kernel": 1, "maxima_sums_kernel": 1, "finish_kernel": 1,
        "weigh_apart_kernel": 1, "complete_kernel": 1,
    }  # fmt: skip
    launches.clear()
    siglip_loss(*leaves, -10.0, backend="triton").backward()
    assert launches == {
        "weigh_edges_kernel": 1,
        "sums_kernel": 1,
        "finish_kernel": 2,
        "complete_kernel": 1,
    }


def test_the_limit_of_small_blocks(monkeypatch: pytest.MonkeyPatch, launches: Counter) -> None:
    from fastclip.triton_kernels import plan

    block = make_block(33, 40, 24)
    monkeypatch.setattr(plan, "SMALL_PAIRS", 33 * 40 + 1)
    check("triton", block)
    assert not launches["shift_kernel"]
    monkeypatch.setattr(plan, "SMALL_PAIRS", 33 * 40)
    check("triton", block)
    assert launches["shift_kernel"] == 1
