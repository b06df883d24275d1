"""The time of each kernel of a step, by torch's profiler: `python -m bench.gpu.kernels`."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from ..cases import Case, make_inputs
from ..losses import LOSSES
from ..measure.timing import wait_for
from ..methods import registry
from ..methods.step import make_step
from ..report import results
from . import figures

METHODS = ("fastclip triton", "fastclip triton kept", "fastclip cuda", "fastclip cuda fused",
           "open_clip")  # fmt: skip
SHAPES = tuple((loss, 32768) for loss in LOSSES)
D = 768
# The number of kernels listed, and of characters of each name: cuBLAS's have hundreds.
MOST, WIDTH = 12, 60


def times(case: Case, method: str, device: str) -> list[tuple[str, int, float]]:
    """Name, launches and total milliseconds of each kernel of a step, the longest first."""
    step = make_step(case, method, make_inputs(case, device))
    for _ in range(2):
        step()
    wait_for(device)
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with warnings.catch_warnings():  # the profiler warns about itself
        warnings.simplefilter("ignore")
        with profile(activities=[activity]) as profiled:
            step()
            wait_for(device)
    field = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    found = [
        (event.key, event.count, getattr(event, field) / 1e3) for event in profiled.key_averages()
    ]
    return sorted((one for one in found if one[2] > 0), key=lambda one: -one[2])


def _write(path: Path, subject: str, found: list[tuple[str, int, float]]) -> None:
    total = sum(milliseconds for _, _, milliseconds in found)
    print(f"{subject}: {total:.2f} ms of kernels", flush=True)
    row = {"step": "kernels", "subject": subject, "unit": "ms"}
    figures.append(path, {**row, "name": "total", "value": total})
    for name, count, milliseconds in found[:MOST]:
        short = f"{count} x {' '.join(name.split())[:WIDTH]}"
        figures.append(path, {**row, "name": short, "value": milliseconds})
        print(f"  {milliseconds:8.3f} ms  {short}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.kernels")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=results.RESULTS)
    parser.add_argument("--without", nargs="*", default=[], metavar="METHOD")
    options = parser.parse_args(arguments)
    path = options.out / "gpu-figures.csv"
    profiled, failed = 0, 0
    for loss, n in SHAPES:
        case = Case(loss, n, n, D, "bfloat16", 14.3)
        for method in METHODS:
            subject = f"{loss} {n} {method}"
            if method in options.without:
                continue
            try:
                found = times(case, method, options.device)
            except (registry.Unavailable, ImportError):
                continue
            except Exception as error:
                failed += 1
                print(f"FAILED: {subject}: {figures.reason(error)}", flush=True)
                continue
            profiled += 1
            _write(path, subject, found)
    print(f"{profiled} steps profiled, {failed} failed; in {path.name}")
    return 0 if profiled and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
