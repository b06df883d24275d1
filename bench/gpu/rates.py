"""Measures the card's rates: `python -m bench.gpu.rates`.

They are those of a copy, of a large square matmul in each arithmetic, and of the engines' library
matmuls of weights and features, whose shapes are less favourable. Operands are random numbers:
zeros need less power and run faster.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from ..measure.timing import CLOCKS, wait_for
from ..report import results
from . import figures, fp32

# Bytes of the copy; edges of the square matmul, of a chunk of weights, of all weights (kept); D.
SIZES = {"cuda": (4 << 30, 8192, 11264, 32768, 768), "cpu": (1 << 20, 64, 96, 128, 32)}
# An idle card's clocks differ from those under load.
BURN_IN_SECONDS = {"cuda": 1.0, "cpu": 0.0}
ROUNDS, SHORTEST = 5, 0.02

Run = Callable[[], object]


def works(device: str) -> Iterator[tuple[str, float, str, Run]]:
    """Yields name, amount of work, unit of the rate, and the function to time, one at a time."""
    yield _copy(device)
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False), ("fp16", torch.float16, False),
        ("tf32", torch.float32, True), ("fp32", torch.float32, False),
    ):  # fmt: skip
        yield _square(device, name, dtype, tf32)
    for rows in SIZES[device][2:4]:
        yield from _products_of_weights(device, rows)


def _copy(device: str) -> tuple[str, float, str, Run]:
    source = torch.ones(SIZES[device][0], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() / 1e9
    return "copy, read and written", moved, "GB/s", lambda: target.copy_(source)


def _square(device: str, name: str, dtype: torch.dtype, tf32: bool) -> tuple[str, float, str, Run]:
    size = SIZES[device][1]
    a = torch.randn(size, size, device=device).to(dtype)

    def multiply() -> None:
        with fp32.precision("tf32" if tf32 else "ieee"):
            torch.mm(a, a)

    return f"{size}^3 {name}", 2 * size**3 / 1e12, "TFLOP/s", multiply


def _products_of_weights(device: str, rows: int) -> Iterator[tuple[str, float, str, Run]]:
    """The engines' matmuls: weights or their transpose times features, stored or accumulated."""
    d = SIZES[device][4]
    weights = torch.randn(rows, rows, device=device, dtype=torch.bfloat16)
    features = torch.randn(rows, d, device=device).to(torch.bfloat16)
    total = torch.zeros(rows, d, device=device)
    into = {"out_dtype": torch.float32} if device == "cuda" else {}  # not available on CPUs
    for side, w in (("w y", weights), ("w^T x", weights.T)):
        name = f"{side} {rows}x{rows}x{d} bf16"
        flops = 2 * rows * rows * d / 1e12
        yield f"{name} to fp32", flops, "TFLOP/s", partial(torch.mm, w, features, **into)
        if device == "cuda":
            add = partial(torch.addmm, total, w, features, out=total, **into)
            yield f"{name} += fp32", flops, "TFLOP/s", add


def rate(work: float, run: Run, device: str) -> tuple[float, float]:
    """Work per second, and seconds per run: the median of a few rounds."""
    clock = CLOCKS[device]
    run()
    wait_for(device)
    repeats = max(1, round(SHORTEST / max(clock(run, 1), 1e-6)))
    seconds = statistics.median(clock(run, repeats) for _ in range(ROUNDS))
    return work / seconds, seconds


def burn_in(device: str) -> None:
    a = torch.randn(*[SIZES[device][1]] * 2, device=device).to(torch.bfloat16)
    spent = 0.0
    while spent < BURN_IN_SECONDS[device]:
        spent += 10 * CLOCKS[device](lambda: torch.mm(a, a), 10)


def software(device: str) -> str:
    """Versions of torch, Triton and Python, and nvidia-smi's report on the card."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "none"
    text = f"torch {torch.__version__}, Triton {version}, Python {sys.version.split()[0]}"
    if device != "cuda":
        return text
    asked = "name,driver_version,clocks.sm,clocks.max.sm,power.limit,memory.total"
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
    try:
        card = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        card = "nvidia-smi does not answer"
    return f"{text}; {card.strip()}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.rates")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=results.RESULTS)
    options = parser.parse_args(arguments)
    device, path = options.device, options.out / "gpu-figures.csv"
    figures.start(path, figures.FIGURES)
    figures.append(path, {"step": "rates", "name": "software", "value": software(device)})
    print(software(device), flush=True)
    burn_in(device)
    failed = 0
    found = []
    for name, work, unit, run in works(device):
        row = {"step": "rates", "subject": name}
        try:
            value, seconds = rate(work, run, device)
        except RuntimeError as error:  # a matmul that this version of torch lacks
            failed += 1
            figures.append(path, {**row, "name": "error", "value": error})
            print(f"FAILED: {name}: {str(error).splitlines()[0]}", flush=True)
            continue
        figures.append(path, {**row, "name": "rate", "value": value, "unit": unit})
        figures.append(path, {**row, "name": "time", "value": 1e3 * seconds, "unit": "ms"})
        print(f"{name:40} {value:10.1f} {unit:8} {1e3 * seconds:9.3f} ms", flush=True)
        found.append(f"{name.split(',')[0]} {value:.0f} {unit}")
    print("; ".join(found[:5]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
