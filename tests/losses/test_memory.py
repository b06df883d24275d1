"""No engine allocates anything of size M x N, nor keeps more than `memory_budget` allows.

The profiler sees every allocation through torch, in any engine. The high-water mark of a separate
process sees all others. Both methods are shown to catch the dense reference.
"""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from conftest import DEVICE
from support.judge import error, numbers
from support.losses import LOSSES
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fastclip

N, D = 6144, 8
MATRIX = 4 * N * N  # bytes, in float32: 144 MiB
# Any engine's chunks and buffers of threads, for any batch; in a process, its libraries' too.
WORKSPACE, PROCESS = 64 << 20, 128 << 20
BEYOND_BUDGET = 16 << 20  # of the C++ engine on two threads, including libraries


def features(n: int, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    x, y = torch.randn(2, n, D, generator=torch.Generator().manual_seed(0)).unbind()
    return [t.to(device, dtype).requires_grad_() for t in (x, y)]


def allocations(function: Callable[[], object]) -> tuple[int, int, int]:
    """Returns bytes: the largest single allocation, the most held at a time, and those held now."""
    if DEVICE.type != "cpu":
        pytest.skip("the profiler's memory events are read for the CPU only")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        kept_alive = function()
    events = run.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    del kept_alive
    held = list(itertools.accumulate(sizes))
    return max(sizes), max(held), held[-1]


def step(loss: str, backend: str, device: torch.device, **options: object) -> Callable[[], Tensor]:
    x, y = features(N, device)
    scale = torch.tensor(2.0, device=device, requires_grad=True)

    def run() -> Tensor:
        value = LOSSES[loss](x, y, scale, backend=backend, **options)
        value.sum().backward()
        return value

    return run


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_no_engine_allocates_an_m_by_n_matrix(
    loss: str, engine: str, reduction: str, device: torch.device
) -> None:
    run = step(loss, engine, device, memory_budget=0, reduction=reduction)
    largest, most, _ = allocations(run)
    assert largest < MATRIX / 4
    assert most < WORKSPACE


def test_the_profiler_catches_the_dense_reference(device: torch.device) -> None:
    largest, most, _ = allocations(step("clip", "reference", device))
    assert largest >= MATRIX
    assert most >= MATRIX


HIGH_WATER = """
import re, sys
import torch
from fastclip.loss import clip_loss, siglip_loss

def high_water():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) << 10

def step(n):
    x, y = (torch.randn(n, 8, requires_grad=True) for _ in range(2))
    for loss in (clip_loss, siglip_loss):
        loss(x, y, 2.0, backend=backend, memory_budget=int(budget)).backward()

backend, budget, *sizes = sys.argv[1:]
step(64)  # code and thread pools
before = high_water()
for n in sizes:
    step(int(n))
print(high_water() - before)
"""


def high_water(backend: str, directory: Path, budget: int = 0, sizes: Iterable[int] = (N,)) -> int:
    """Returns by how many bytes a process grows over steps of these sizes."""
    command = [sys.executable, "-c", HIGH_WATER, backend, str(budget), *map(str, sizes)]
    # glibc keeps freed chunks, up to twice the most ever needed at a time. The tests exclude that.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' /proc")
def test_a_process_never_holds_the_matrix(
    backends: list[str], device: torch.device, tmp_path: Path
) -> None:
    if device.type != "cpu":
        pytest.skip("a process's high-water mark counts CPU memory")
    for backend in backends:
        held = high_water(backend, tmp_path)
        if backend == "reference":
            assert held > 2 * MATRIX, "the check would not notice the matrix"
        else:
            assert held < PROCESS, backend


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' /proc")
@pytest.mark.skipif(fastclip.backends()["cpu"] != "available", reason="only the C++ engine keeps")
@pytest.mark.parametrize("sizes", [(N,), (N, N), (N // 2, N), (N, N // 2, N - 100, N)], ids=str)
def test_a_process_grows_by_no_more_than_the_budget(
    sizes: tuple[int, ...], device: torch.device, tmp_path: Path
) -> None:
    """Steps of several sizes do not add up, though kept products wait for the next step."""
    if device.type != "cpu":
        pytest.skip("a process's high-water mark counts CPU memory")
    budget = 64 << 20
    held = high_water("cpu", tmp_path, budget, sizes)
    assert budget / 2 < held < budget + BEYOND_BUDGET


BUDGETS = (0, 1, 1 << 16, 1 << 20, 1 << 40, None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_budget_changes_only_rounding(
    loss: str, engine: str, normalize: bool, dtype: torch.dtype, device: torch.device
) -> None:
    results = []
    for budget in BUDGETS:
        x, y = features(515, device, dtype)
        scale = torch.tensor(2.0, device=device, requires_grad=True)
        options = {"normalize": normalize, "memory_budget": budget, "backend": engine}
        value = LOSSES[loss](x, y, scale, -1.0, **options)
        value.backward()
        results.append((value, x.grad, y.grad, scale.grad))
    eps = {torch.float64: 1e-6, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)
    for budget, others in zip(BUDGETS[1:], results[1:], strict=True):
        for result, other in zip(results[0], others, strict=True):
            assert error(other, numbers(result)) <= eps, f"memory_budget={budget}"


@pytest.mark.parametrize("loss", LOSSES)
def test_memory_held_for_the_backward_stays_within_the_budget(
    loss: str, engine: str, device: torch.device
) -> None:
    x, y = features(N, device)
    own = 2 * 4 * N * D + 64 * 2 * N  # a gradient for each tower, some numbers a line
    for budget in (0, 1 << 20, 16 << 20):
        options = {"backend": engine, "memory_budget": budget}
        *_, held = allocations(lambda options=options: LOSSES[loss](x, y, 2.0, **options))
        assert held <= budget + own


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_is_held_once_the_loss_is_gone(
    loss: str, engine: str, device: torch.device
) -> None:
    run = step(loss, engine, device, memory_budget=0)
    run()  # makes the gradients that later runs add to
    *_, held = allocations(lambda: run().detach())
    assert held < 64 << 10
