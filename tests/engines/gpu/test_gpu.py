"""Only a card can show these: nothing waits, graphs, memory, large batches and offsets.

Run by `make gpu`; skipped elsewhere.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKENDS, DEVICE
from support.dense_block import DTYPES
from support.gpu_engine_case import small_chunks
from support.judge import roundoff
from support.streamed_truth import truth
from torch import Tensor

from fastclip import contrast
from fastclip.engine import operators
from fastclip.engine.block import Block, Side, Statistics, Upstream, Wanted
from fastclip.loss import clip_loss, siglip_loss

FUSED = [name for name in ("triton", "cuda") if name in BACKENDS]
pytestmark = pytest.mark.skipif(
    DEVICE.type != "cuda" or not FUSED, reason="needs a CUDA device and a fused engine for it"
)
on_each = pytest.mark.parametrize("fused", FUSED or ["triton"])

LOSSES = {"clip": clip_loss, "siglip": siglip_loss}


def of_everything(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, *, reduction: str = "mean", **options: object
) -> Tensor:
    """A loss of all statistics, with every option of `contrast`."""
    ids = torch.arange(len(x), device=x.device) // 3
    c = contrast(
        x, y, scale, bias, ids=(ids, ids), same_id="positive", false_negative_margin=0.1,
        key_bias=torch.linspace(-1, 1, len(y), device=y.device), **options,
    )  # fmt: skip
    rows, columns = c.rows - c.row_positives, c.columns - c.column_positives
    losses = (F.softplus(rows, threshold=60) + F.softplus(columns, threshold=60)).float()
    return losses.mean() if reduction == "mean" else losses


STEPS = LOSSES | {"contrast": of_everything}
MIB = 1 << 20
FORMS = ("small", "large")
# About half the rows of LARGE_SIZES: kept weights, and others that are made anew.
SOME_KEPT = 9 * MIB
# More than two tiles a processor, so that persistent programs go round; the last tiles are cut off.
LARGE_SIZES = 3000, 520


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The Triton engine has kernels of its own for small blocks; "large" asks for the others."""
    if request.param == "large" and "triton" in FUSED:
        from fastclip.triton_kernels import plan

        monkeypatch.setattr(plan, "SMALL_PAIRS", 0)
    return request.param


def inputs(n: int, d: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    towers = torch.randn(2, n, d, device=DEVICE, generator=generator)
    leaves = [*F.normalize(towers, dim=-1).to(dtype).unbind()]
    leaves += [torch.tensor(value, device=DEVICE) for value in (20.0, -5.0)]
    return [leaf.clone().requires_grad_() for leaf in leaves]


def step(loss: str, leaves: list[Tensor], engine: str, **options: object) -> list[Tensor]:
    value = STEPS[loss](*leaves, backend=engine, **options)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]


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
    """Also one that is replayed on inputs which need the sweep with running maxima."""
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
    # Back again: a flag that one replay has set must not outlast it.
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
    """The most that an engine holds of one chunk, however large the block."""
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
    # Gradients in fp32 before they are rounded, and a few numbers a line.
    wide = 2 * 4 * n * d + 200 * n
    assert peak <= gradients + wide + chunk_bytes(fused) + 32 * MIB
    assert peak < 4 * n * n, "an N x N matrix in fp32 would fit"


class Large(NamedTuple):
    """A batch; normalize also asks for features of two lengths."""

    loss: str
    dtype: str
    d: int
    scale: float
    normalize: bool = False

    def __str__(self) -> str:
        return " ".join(map(str, self[:4])) + " raw" * self.normalize

    def leaves(self, n: int) -> list[Tensor]:
        leaves = inputs(n, self.d, DTYPES[self.dtype])
        with torch.no_grad():
            leaves[2].fill_(self.scale)
            if self.normalize:
                for tower in leaves[:2]:
                    tower *= 2 ** tower[:, :1].sign() * 1.5
        return leaves


LARGE = [
    Large("clip", "bfloat16", 128, 14.3),
    Large("clip", "bfloat16", 1000, 100.0, normalize=True),
    Large("clip", "bfloat16", 768, 500.0),  # one reference is not enough
    Large("clip", "float16", 520, 100.0),
    Large("clip", "float16", 1001, 14.3, normalize=True),
    Large("clip", "float32", 96, 100.0, normalize=True),
    Large("clip", "float32", 520, 14.3),
    Large("siglip", "bfloat16", 1001, 14.3, normalize=True),
    Large("siglip", "bfloat16", 520, 100.0),
    Large("siglip", "float16", 1000, 100.0, normalize=True),
    Large("siglip", "float32", 96, 14.3),
    Large("siglip", "float32", 1001, 100.0, normalize=True),
]


FP16_AT_500 = Large("clip", "float16", 520, 500.0)


def assert_is_right(case: Large, n: int, engine: str, **options: object) -> None:
    """A batch, by what the arithmetic of its features loses."""
    # No more than one half-precision weight's rounding: the errors of many do not add up.
    dtype = DTYPES[case.dtype]
    weights = roundoff(dtype) / 2 if dtype.itemsize == 2 else 0.0
    if engine == "triton" and dtype == torch.float16 and options.get("memory_budget"):
        weights += roundoff(torch.bfloat16) / 2  # that kept weights have
    assert_near(case.loss, case.leaves(n), weights, engine, normalize=case.normalize, **options)


def logits_error(leaves: list[Tensor]) -> float:
    """The error of tensor cores in the largest logit of random unit features, six deviations from
    0: they cut off half a unit in the last place of t for each 16 products (arXiv 2403.00232). The
    CUDA engine's second way of the first sweep multiplies without them."""
    x, _, scale, _ = leaves
    if x.dtype.itemsize > 2:
        return 0.0
    d = x.shape[1]
    return 6 / d**0.5 * scale.item() * d / 16 * 2**-25


def assert_near(
    loss: str, leaves: list[Tensor], weights: float, engine: str, normalize: bool = False,
    **options: object,
) -> None:  # fmt: skip
    """Loss and gradients against float64. weights: what their rounding may do to dx and dy."""
    value, *results = step(loss, leaves, engine, normalize=normalize, **options)
    exact, *gradients = truth(loss, *leaves, normalize=normalize)
    assert (value - exact).abs() <= 4e-6 * exact
    logits = logits_error(leaves)
    for name, result, right in zip(("dx", "dy", "dscale"), results, gradients, strict=False):
        # No gradient of this dtype comes closer. fp16 has fewer digits below 6e-5.
        stored = (right.to(result.dtype) - right).norm() / right.norm()
        error = (result.double() - right).norm() / right.norm()
        assert error <= stored + (logits if name == "dscale" else weights) + 2e-5, (
            f"{name} is off by {error:.1e}, stored {stored:.1e}"
        )
    if loss == "clip":
        assert not results[3]
    else:
        assert (results[3] - gradients[3]).abs() <= 2e-5 * gradients[3].abs()


@on_each
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_batches_are_right(case: Large, fused: str) -> None:
    """On several chunks of weights, of the engine's own size."""
    assert_is_right(case, 12345, fused)


@on_each
@pytest.mark.usefixtures("on_the_device")
@pytest.mark.parametrize("budget", [0, 64 * MIB])
@pytest.mark.parametrize("case", [*LARGE[1:4], FP16_AT_500, LARGE[7]], ids=str)
def test_many_chunks_are_right(
    case: Large, budget: int, fused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a part of the products is kept, and where it is of no use."""
    with small_chunks(fused, monkeypatch, 1024, 2048):
        assert_is_right(case, 7001, fused, memory_budget=budget)


def one_row(t: Tensor) -> Tensor:
    """The first row, expanded: stride 0."""
    return t[:1].expand(t.shape)


def of_wider_rows(t: Tensor) -> Tensor:
    """The same rows in a wider tensor, between numbers that would spoil every result."""
    wide = t.new_full((len(t), t.shape[1] + 128), torch.nan)
    wide[:, 64:-64] = t
    return wide[:, 64:-64]


@on_each
@pytest.mark.parametrize("budget", [0, 2 * MIB])
@pytest.mark.parametrize("laid", [one_row, of_wider_rows])
@pytest.mark.parametrize("loss", LOSSES)
def test_plain_tiles_of_strided_rows(
    loss: str, laid: Callable[[Tensor], Tensor], budget: int, fused: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Either tower: kernels for whole tiles find rows by the strides of a descriptor."""
    if fused == "triton":
        from fastclip.triton_kernels import plan

        monkeypatch.setattr(plan, "SMALL_PAIRS", 0)
    for tower in (0, 1):
        leaves = Large(loss, "bfloat16", 520, 14.3).leaves(1500)
        leaves[tower] = laid(leaves[tower].detach()).requires_grad_()
        assert leaves[tower].stride() == ((0, 1) if laid is one_row else (648, 1))
        # Weights of equal rows round alike, so their errors add up, and their sums less 1 cancel.
        assert_near(loss, leaves, 4 * roundoff(torch.bfloat16), fused, memory_budget=budget)


@on_each
def test_offsets_beyond_32_bits(fused: str) -> None:
    """Features of more than 2^31 numbers: the last rows come out as they do alone."""
    m, n, d, last = 4_200_000, 64, 512, 1000
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB")
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.empty(m, d, dtype=torch.bfloat16, device=DEVICE).normal_(generator=generator)
    y = torch.randn(n, d, device=DEVICE, generator=generator).to(torch.bfloat16)
    scale, gain = torch.tensor(0.1, device=DEVICE), torch.ones((), device=DEVICE)
    block = Block(Side(x), Side(y), scale)
    state, positive, kept = operators.sweep(fused, block)
    alone, _, _ = operators.sweep(fused, block._replace(x=Side(x[-last:]), offset=-last))
    rows = state[1, m - last : m].log2() + state[0, m - last : m]
    torch.testing.assert_close(rows, alone[1, :last].log2() + alone[0, :last], rtol=0, atol=1e-4)

    # Weights of order 1 / N in every row.
    a = state[1].reciprocal()
    p = torch.zeros(m, dtype=torch.float64, device=DEVICE)
    wanted = Wanted(True, False, False, False, x.dtype, y.dtype)

    def gradient(rows: slice) -> Tensor:
        every = torch.arange(m + n, device=DEVICE)
        lines = torch.cat((every[:m][rows], every[m:]))
        return operators.weigh(
            fused, block._replace(x=Side(x[rows]), offset=-m),
            Statistics(state[:, lines].contiguous(), positive[rows], kept),
            Upstream(a[lines], p[rows], gain), wanted,
        ).x  # fmt: skip

    whole, part = gradient(slice(None))[-last:].double(), gradient(slice(m - last, m)).double()
    # The library may take another kernel for another size: the last digit in bf16 may differ.
    assert part.norm() > 1
    assert (whole - part).norm() <= 2**-8 * part.norm()


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
        # None of the rows are kept, and of 700 a part.
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
    # Compiles what the sanitizer then needs only to load.
    subprocess.run(case, check=True, timeout=2 * SANITIZER_SECONDS)
    # Each tensor in an allocation of its own, whose end a checker can see.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *case]
    process = subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=SANITIZER_SECONDS)
    except subprocess.TimeoutExpired:
        # The checked program, too, which would keep the card busy.
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        pytest.skip(f"it took more than {SANITIZER_SECONDS} s")
    assert process.returncode == 0, output[-3000:]
