"""What only a card can show of its engines: nothing waits, graphs, memory, large offsets.

Run by `make gpu`; skipped elsewhere.
"""

import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKENDS, DEVICE
from torch import Tensor

from fastclip.loss import clip_loss, siglip_loss
from fastclip.reference import clip_loss as dense_clip_loss

FUSED = [name for name in ("triton", "cuda") if name in BACKENDS]
pytestmark = pytest.mark.skipif(
    DEVICE.type != "cuda" or not FUSED, reason="needs a CUDA device and a fused engine for it"
)
on_each = pytest.mark.parametrize("fused", FUSED or ["triton"])

LOSSES = {"clip": clip_loss, "siglip": siglip_loss}
MIB = 1 << 20
# Bytes of a chunk of weights and of partial sums; of products, weights and partial sums
# (triton_kernels/plan.py, csrc/chunks_cuda.h).
CHUNKS = {"triton": (256 + 128) * MIB, "cuda": (243 + 122 + 8) * MIB}


def inputs(n: int, d: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    towers = torch.randn(2, n, d, device="cuda", generator=generator)
    leaves = [*F.normalize(towers, dim=-1).to(dtype).unbind()]
    leaves += [torch.tensor(value, device="cuda") for value in (20.0, -5.0)]
    return [leaf.clone().requires_grad_() for leaf in leaves]


def step(loss: str, leaves: list[Tensor], engine: str, **options: object) -> list[Tensor]:
    value = LOSSES[loss](*leaves, backend=engine, **options)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]


@on_each
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_waits_for_the_device(loss: str, normalize: bool, fused: str) -> None:
    leaves = inputs(1000, 512)
    for reduction in ("mean", "none"):
        step(loss, leaves, fused, normalize=normalize, reduction=reduction)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(loss, leaves, fused, normalize=normalize, reduction=reduction)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@on_each
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_can_be_captured_in_a_graph(loss: str, fused: str) -> None:
    """Also one that is replayed on inputs which need the sweep with running maxima."""
    leaves = inputs(700, 96)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(loss, leaves, fused)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(loss, leaves, fused)
    for seed, scale in ((1, 14.3), (2, 500.0)):
        with torch.no_grad():
            for leaf, value in zip(leaves, inputs(700, 96, seed=seed), strict=True):
                leaf.copy_(value)
            leaves[2].fill_(scale)
        graph.replay()
        torch.cuda.synchronize()
        for result, expected in zip(captured, step(loss, leaves, fused), strict=True):
            assert torch.equal(result, expected)


@on_each
@pytest.mark.parametrize("n, d", [(16384, 512), (50001, 64)])
@pytest.mark.parametrize("loss", LOSSES)
def test_memory_is_bounded(loss: str, n: int, d: int, fused: str) -> None:
    leaves = inputs(n, d)
    step(loss, leaves, fused)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = step(loss, leaves, fused)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    gradients = sum(r.numel() * r.element_size() for r in results)
    # Gradients in fp32 before they are rounded, and a few numbers a line.
    wide = 2 * 4 * n * d + 200 * n
    assert peak <= gradients + wide + CHUNKS[fused] + 32 * MIB
    assert peak < 4 * n * n, "an N x N matrix in fp32 would fit"


@on_each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_large_batches_are_right(dtype: torch.dtype, scale: float, fused: str) -> None:
    """Against the dense loss in float64, on several chunks of weights."""
    leaves = inputs(12345, 128, dtype)
    with torch.no_grad():
        leaves[2].fill_(scale)
    value, dx, dy, dscale, _ = step("clip", leaves, fused)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves[:3]]
    exact = dense_clip_loss(*wide)
    gradients = torch.autograd.grad(exact, wide)
    rounding = torch.finfo(dtype).eps
    assert (value - exact).abs() <= 1e-6 * exact
    for result, truth in zip((dx, dy, dscale), gradients, strict=True):
        error = (result.double() - truth).norm() / truth.norm()
        assert error <= (2e-5 if result.dtype == torch.float32 else 2 * rounding), result.shape


@on_each
def test_offsets_beyond_32_bits(fused: str) -> None:
    """Features of more than 2^31 numbers: the last rows come out as they do alone."""
    m, n, d, last = 4_200_000, 64, 512, 1000
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB")
    x = torch.empty(m, d, dtype=torch.bfloat16, device="cuda").normal_()
    y = torch.randn(n, d, device="cuda").to(torch.bfloat16)
    scale, gain = torch.tensor(0.1, device="cuda"), torch.ones((), device="cuda")
    sweep, weigh = (
        getattr(getattr(torch.ops.fastclip, name), fused) for name in ("sweep", "weigh")
    )
    state, positive, kept = sweep(x, y, None, None, scale, None, None, 0, "softmax", 0)
    a = torch.rand(m + n, dtype=torch.float64, device="cuda")
    p = torch.zeros(m, dtype=torch.float64, device="cuda")

    def gradient(rows: slice) -> Tensor:
        every = torch.arange(m + n, device="cuda")
        lines = torch.cat((every[:m][rows], every[m:]))
        return weigh(
            x[rows], y, None, None, scale, None, state[:, lines].contiguous(), positive[rows],
            a[lines], p[rows], gain, kept, -m, "softmax", True, False, False, x.dtype, y.dtype,
        )[0]  # fmt: skip

    # Of two sizes the library may take two kernels: the last digit in bf16 may differ.
    torch.testing.assert_close(
        gradient(slice(None))[-last:], gradient(slice(m - last, m)), rtol=2**-7, atol=1e-6
    )
    alone, _, _ = sweep(x[-last:], y, None, None, scale, None, None, -last, "softmax", 0)
    sums = state[1, m - last : m].log2() + state[0, m - last : m]
    torch.testing.assert_close(sums, alone[1, :last].log2() + alone[0, :last], rtol=0, atol=1e-5)


SMALL_CASE = """
import sys, torch
from fastclip.loss import clip_loss, siglip_loss
for loss in (clip_loss, siglip_loss):
    for scale in (14.3, 500.0):
        x, y = torch.randn(2, 133, 72, device="cuda", dtype=torch.bfloat16).unbind()
        x, y = x.requires_grad_(), y.requires_grad_()
        loss(x, y, scale, -3.0, normalize=True, backend=sys.argv[1]).backward()
torch.cuda.synchronize()
"""


@on_each
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool: str, fused: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on PATH")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9"]
    command += [sys.executable, "-c", SMALL_CASE, fused]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except subprocess.TimeoutExpired:
        pytest.skip("it took more than half a minute")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
