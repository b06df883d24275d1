"""The loss tests and a short bench on a CUDA device, with whatever engines it finds there.

`make gpu` runs this with the machine's own Python and packages. It installs nothing, skips by name
what is missing, keeps to a few minutes, and writes every row to a CSV in $OUT or bench/results.

Each row is forward and backward of one loss on one shape: the median time of interleaved runs,
their spread, the peak of memory beyond inputs and gradients, the rate on the passes that are due
(one pass is a matmul of 2 N N D FLOP; four for CLIP, three for SigLIP), that rate over the one of
a plain matmul in the same run, and the error of the image gradient against float64.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.util
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = ("open_clip", "hypothesis", "ml_dtypes", "triton")
TESTS = tuple(
    f"tests/test_{promise}.py"
    for promise in ("accuracy", "shapes", "errors", "gradients_requested", "determinism")
)

# With the build before them they stay within eight minutes.
TEST_SECONDS = 240
BENCH_SECONDS = 120

DIM = 768
SIZES_AND_SCALES = ((2048, 14.3), (8192, 14.3), (8192, 100.0), (32768, 14.3))
DTYPES = (torch.bfloat16, torch.float32)
PASSES_DUE = {"clip": 4, "siglip": 3}
SIGLIP_BIAS = -10.0
LARGEST_TRUTH = 8192  # a float64 logit matrix and its copies must fit beside the rest
WARM_UPS, REPEATS = 2, 7

Loss = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass
class Row:
    """One line of the CSV; a number that could not be had is None."""

    gpu: str
    torch: str
    loss: str
    dtype: str
    n: int
    dim: int
    scale: float
    method: str
    ms: float | None = None
    spread: float | None = None  # (slowest - fastest) / median
    peak_mib: float | None = None
    tflops: float | None = None
    of_matmul: float | None = None
    over_dense: float | None = None  # how many times faster than the dense loss
    error_dx: float | None = None


class Pairs:
    """Normalised random features of `n` pairs (cosine about 0.3), and the parameters, as leaves."""

    def __init__(self, n: int, scale: float, dtype: torch.dtype, biased: bool) -> None:
        generator = torch.Generator("cuda").manual_seed(n)
        noise = torch.randn(2, n, DIM, device="cuda", generator=generator)
        towers = torch.stack((noise[0], 0.3 * noise[0] + noise[1]))
        x, y = torch.nn.functional.normalize(towers, dim=-1)
        self.x = x.to(dtype).requires_grad_()
        self.y = y.to(dtype).requires_grad_()
        self.scale = torch.tensor(scale, device="cuda", requires_grad=True)
        bias = torch.tensor(SIGLIP_BIAS, device="cuda", requires_grad=True)
        self.bias = bias if biased else None

    def step(self, loss: Loss) -> Tensor:
        """Forward and backward; the image features' gradient."""
        for leaf in (self.x, self.y, self.scale, self.bias):
            if leaf is not None:
                leaf.grad = None
        loss(self.x, self.y, self.scale, self.bias).backward()
        return self.x.grad

    def true_gradient(self, dense: Loss) -> Tensor:
        """The image features' gradient in float64, of the very features that the methods get."""
        x = self.x.detach().double().requires_grad_()
        bias = None if self.bias is None else self.bias.detach().double()
        dense(x, self.y.detach().double(), self.scale.detach().double(), bias).backward()
        return x.grad


def milliseconds(run: Callable[[], object]) -> float:
    """Time on the device, from the first kernel's turn to the end of the last."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def matmul_rate(n: int, dtype: torch.dtype) -> float:
    """FLOP/s of a plain (n, D) @ (D, n) in the precision settings of this run."""
    x = torch.randn(n, DIM, device="cuda", dtype=dtype)
    out = torch.empty(n, n, device="cuda", dtype=dtype)
    times = [milliseconds(lambda: torch.mm(x, x.T, out=out)) for _ in range(WARM_UPS + REPEATS)]
    return 2 * n * n * DIM / statistics.median(times[WARM_UPS:]) * 1e3


def engines() -> list[str]:
    """The engines that take CUDA tensors here; says why each other one does not."""
    import fastclip

    states = fastclip.backends()
    names = [name for name in states if name not in ("cpu", "reference")]
    for name in names:
        print(f"engine {name}: {states[name]}")
    return [name for name in names if states[name] == "available"]


@functools.cache
def open_clip_losses() -> dict[str, Loss]:
    """open_clip's own losses, or none where it is missing or does not import."""
    try:
        from open_clip.loss import ClipLoss, SigLipLoss
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
        print(f"bench goes without open_clip: {error}")
        return {}
    return {"clip": ClipLoss(), "siglip": SigLipLoss()}


def methods(loss: str, names: list[str]) -> dict[str, Loss]:
    """The dense loss first, then open_clip's where it imports, then fastclip's engines."""
    import fastclip.loss
    import fastclip.reference

    name = f"{loss}_loss"
    found: dict[str, Loss] = {"dense": getattr(fastclip.reference, name)}
    if loss in open_clip_losses():
        found["open_clip"] = open_clip_losses()[loss]
    fused = getattr(fastclip.loss, name)
    for engine in names:
        found[f"fastclip {engine}"] = lambda *inputs, e=engine: fused(*inputs, backend=e)
    return found


def peak_and_error(pairs: Pairs, loss: Loss, truth: Tensor | None) -> tuple[float, float | None]:
    """MiB beyond inputs and gradients, and the relative error of dx; this also warms up."""
    for _ in range(WARM_UPS):
        pairs.step(loss)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    gradient = pairs.step(loss)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    if truth is None:
        return extra / 2**20, None
    return extra / 2**20, float((gradient.double() - truth).norm() / truth.norm())


def measure(loss: str, n: int, scale: float, dtype: torch.dtype, names: list[str]) -> list[Row]:
    """The rows of one case. A method that runs out of memory keeps a row without numbers."""
    candidates = methods(loss, names)
    pairs = Pairs(n, scale, dtype, biased=loss == "siglip")
    truth = pairs.true_gradient(candidates["dense"]) if n <= LARGEST_TRUTH else None
    rows, times = {}, {}
    for method, function in candidates.items():
        rows[method] = row = Row(
            gpu=torch.cuda.get_device_name(), torch=torch.__version__, loss=loss,
            dtype=str(dtype).removeprefix("torch."), n=n, dim=DIM, scale=scale, method=method,
        )  # fmt: skip
        try:
            row.peak_mib, row.error_dx = peak_and_error(pairs, function, truth)
            times[method] = []
        except torch.OutOfMemoryError:
            print(f"{method} runs out of memory: {loss} {row.dtype} N={n}")
        torch.cuda.empty_cache()

    for _ in range(WARM_UPS + REPEATS):
        for method, measured in times.items():
            measured.append(milliseconds(lambda m=method: pairs.step(candidates[m])))
    rate = matmul_rate(n, dtype)
    for method, measured in times.items():
        row, kept = rows[method], measured[WARM_UPS:]
        row.ms = statistics.median(kept)
        row.spread = (max(kept) - min(kept)) / row.ms
        flops = PASSES_DUE[loss] * 2 * n * n * DIM / row.ms * 1e3
        row.tflops, row.of_matmul = flops / 1e12, flops / rate
        if rows["dense"].ms is not None:
            row.over_dense = rows["dense"].ms / row.ms
    return list(rows.values())


def bench() -> list[Row]:
    """Every case that fits in the time; those left out are named."""
    names = engines()
    rows, began = [], time.monotonic()
    for loss in PASSES_DUE:
        for dtype in DTYPES:
            for n, scale in SIZES_AND_SCALES:
                case = f"{loss} {str(dtype).removeprefix('torch.')} N={n} scale={scale}"
                if time.monotonic() - began > BENCH_SECONDS:
                    print(f"left out for time: {case}")
                    continue
                print(f"bench: {case}", flush=True)
                rows += measure(loss, n, scale, dtype, names)
    return rows


def run_tests() -> str:
    """Runs the loss tests on the device in a process of their own; how they ended."""
    if importlib.util.find_spec("pytest") is None:
        return "not run: pytest is not installed"
    # Safe path: `-m` would else put the root, and with it triton_kernels/, on sys.path.
    environment = {**os.environ, "FASTCLIP_TEST_DEVICE": "cuda", "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    try:
        code = subprocess.run(command, cwd=ROOT, env=environment, timeout=TEST_SECONDS).returncode
    except subprocess.TimeoutExpired:
        return f"FAILED: not done in {TEST_SECONDS} s"
    return "passed" if code == 0 else f"FAILED: pytest ended with {code}"


def write_csv(rows: list[Row]) -> Path:
    """One file per GPU, replaced by each run."""
    folder = Path(os.environ.get("OUT") or ROOT / "bench" / "results")
    folder.mkdir(parents=True, exist_ok=True)
    gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    path = folder / f"gpu-{gpu}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    return path


def table(rows: list[Row]) -> str:
    """The rows for a terminal, a dash for what could not be had."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    lines = [
        f"{'loss':7}{'dtype':9}{'N':>6}{'scale':>6}  {'method':16}{'ms':>9}{'x dense':>9}"
        f"{'MiB':>8}{'TFLOP/s':>9}{'matmul':>8}{'err dx':>9}"
    ]
    for row in rows:
        lines.append(
            f"{row.loss:7}{row.dtype:9}{row.n:6}{row.scale:6g}  {row.method:16}"
            f"{number(row.ms, '.3f'):>9}{number(row.over_dense, '.2f'):>9}"
            f"{number(row.peak_mib, '.0f'):>8}{number(row.tflops, '.1f'):>9}"
            f"{number(row.of_matmul, '.2f'):>8}{number(row.error_dx, '.1e'):>9}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only tell whether there is a GPU")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"make gpu: torch {torch.__version__} finds no CUDA device here", file=sys.stderr)
        return 2
    if arguments.check:
        return 0

    missing = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
    if missing:
        print(f"not installed, so what needs them is skipped: {', '.join(missing)}")
    tests = run_tests()
    rows = bench()
    path = write_csv(rows)
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, D = {DIM}; rows in {path}")
    print(table(rows))
    print(f"tests on the device: {tests}")
    return 0 if tests == "passed" else 1


if __name__ == "__main__":
    sys.exit(main())
