"""Properties that only a card can show: no waiting, CUDA graphs, memory, no error of the sanitizer.

`make gpu` runs these tests; elsewhere they are skipped.
"""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import DEVICE
from support.card_steps import FUSED, MIB, STEPS, inputs, on_each, step
from support.losses import LOSSES

pytestmark = pytest.mark.skipif(
    DEVICE.type != "cuda" or not FUSED, reason="needs a CUDA device and a fused engine for it"
)


FORMS = ("small", "large")
# A budget for about half the rows of LARGE_SIZES: the weights of the others are computed anew.
SOME_KEPT = 9 * MIB
# More than two tiles a processor, so that persistent programs loop; the last tiles are cut off.
LARGE_SIZES = 3000, 520


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The Triton engine has special kernels for small blocks; "large" selects the others."""
    if request.param == "large" and "triton" in FUSED:
        from fastclip.triton_kernels import plan

        monkeypatch.setattr(plan, "SMALL_PAIRS", 0)
    return request.param


@on_each
@pytest.mark.parametrize("budget", [0, SOME_KEPT])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("loss", STEPS)
def test_nothing_waits_for_the_device(
    loss: str, normalize: bool, budget: int, fused: str, form: str
) -> None:
    leaves = inputs(*(LARGE_SIZES if form == "large" else (1000, 512)))
    for reduction in ("mean", "none"):
        options = {"normalize": normalize, "reduction": reduction, "memory_budget": budget}
        step(loss, leaves, fused, **options)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(loss, leaves, fused, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@on_each
@pytest.mark.parametrize("budget", [0, SOME_KEPT])
@pytest.mark.parametrize("loss", STEPS)
def test_a_step_can_be_captured_in_a_graph(loss: str, budget: int, fused: str, form: str) -> None:
    """A graph is also right if it is replayed on inputs that need the sweep with running maxima."""
    sizes = LARGE_SIZES if form == "large" else (700, 96)
    leaves = inputs(*sizes)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(loss, leaves, fused, memory_budget=budget)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(loss, leaves, fused, memory_budget=budget)
    # The last scale is the first again: a flag that one replay has set must not outlast it.
    for seed, scale in ((1, 14.3), (2, 500.0), (3, 14.3)):
        with torch.no_grad():
            for leaf, value in zip(leaves, inputs(*sizes, seed=seed), strict=True):
                leaf.copy_(value)
            leaves[2].fill_(scale)
        graph.replay()
        torch.cuda.synchronize()
        eager = step(loss, leaves, fused, memory_budget=budget)
        for result, expected in zip(captured, eager, strict=True):
            assert torch.isfinite(expected).all()
            assert torch.equal(result, expected)


def chunk_bytes(engine: str) -> int:
    """Returns the most memory that an engine uses for one chunk, however large the block is."""
    if engine == "cuda":
        return (243 + 122 + 8) * MIB  # products, weights, partial sums (csrc/cuda/chunks.h)
    from fastclip.triton_kernels import plan

    return plan.WEIGHT_BYTES + plan.PARTIAL_BYTES


@on_each
@pytest.mark.parametrize("n, d", [(16384, 512), (50001, 64)])
@pytest.mark.parametrize("loss", LOSSES)
def test_memory_is_bounded(loss: str, n: int, d: int, fused: str) -> None:
    leaves = inputs(n, d)
    step(loss, leaves, fused, memory_budget=0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = step(loss, leaves, fused, memory_budget=0)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    gradients = sum(r.numel() * r.element_size() for r in results)
    # Gradients in fp32 before they are rounded, and a few numbers for each line.
    wide = 2 * 4 * n * d + 200 * n
    assert peak <= gradients + wide + chunk_bytes(fused) + 32 * MIB
    assert peak < 4 * n * n, "an N x N matrix in fp32 would fit"


SANITIZED = """
import sys, torch
from fastclip.loss import clip_loss, siglip_loss
engine, form = sys.argv[1:]
n, d = (700, 520) if form == "large" else (300, 72)
if form == "large" and engine == "triton":
    from fastclip.triton_kernels import plan
    plan.SMALL_PAIRS = 0
torch.manual_seed(0)
for loss in (clip_loss, siglip_loss):
    for scale in (14.3, 500.0):
        # Budgets for no rows, and for some of 700 rows.
        for budget in (0, 600_000):
            x, y = torch.randn(2, n, d, device="cuda", dtype=torch.bfloat16).unbind()
            x, y = x.requires_grad_(), y.requires_grad_()
            options = {"normalize": True, "memory_budget": budget, "backend": engine}
            loss(x, y, scale, -3.0, **options).backward()
torch.cuda.synchronize()
"""
SANITIZER_SECONDS = 60


@pytest.mark.sanitizer
@on_each
@pytest.mark.parametrize("size", FORMS)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool: str, size: str, fused: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on PATH")
    case = [sys.executable, "-c", SANITIZED, fused, size]
    # This run compiles the kernels, so that the sanitizer's run only loads them.
    subprocess.run(case, check=True, timeout=2 * SANITIZER_SECONDS)
    # Each tensor gets an allocation of its own, so that the sanitizer sees its end.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *case]
    process = subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=SANITIZER_SECONDS)
    except subprocess.TimeoutExpired:
        # Kills the checked program, too, which would keep the card busy.
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        pytest.skip(f"it took more than {SANITIZER_SECONDS} s")
    assert process.returncode == 0, output[-3000:]
