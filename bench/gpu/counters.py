"""Nsight Compute's counters for a sweep kernel, a weighing kernel and a library's matmul.

    python -m bench.gpu.counters           runs ncu on each of them, one after the other
    python -m bench.gpu.counters --step    the program that ncu profiles

The clocks are left alone (`--clock-control none`), because the card may be shared. The metrics in
METRICS are printed; all of ncu's hundreds of metrics are in gpu-ncu.csv.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import sys
from pathlib import Path

import torch

from ..report import results
from . import figures, process, steps, tiles

N = 16384
# For each pattern, only the first launch of a matching kernel is profiled.
KERNELS = {
    "sweep": "^sweep_kernel$", "weigh": "^weigh_kernel$", "product": "gemm|nvjet|cutlass|xmma",
}  # fmt: skip
METRICS = {
    "time": r"^gpu__time_duration\.sum$",
    "registers a thread": r"^launch__registers_per_thread$",
    "tensor pipe, % of peak": r"^sm__pipe_tensor_cycles_active\.avg\.pct_of_peak_sustained_active$",
    "bytes through L2": r"^lts__t_bytes\.sum$",
    "DRAM, % of peak": r"^dram__throughput\..*pct_of_peak_sustained_elapsed$",
    "sectors a store request": r"^l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_st",
    "warps active, % of peak": r"^sm__warps_active\.avg\.pct_of_peak_sustained_active$",
    "stalled for": r"^smsp__average_warps?_issue_stalled_(?!.*not_issued).*_per_issue_active",
}
STALLS = 3  # the number of stall reasons printed, the longest first


def find() -> str | None:
    return shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")


def command(ncu: str, pattern: str, target: Path) -> list[str]:
    look = [ncu, "--clock-control", "none", "--profile-from-start", "off", "--set", "full"]
    look += ["--target-processes", "all", "--kernel-name-base", "function", "--launch-count", "1"]
    look += ["--kernel-name", f"regex:{pattern}", "--csv", "--page", "raw"]
    look += ["--log-file", str(target), "--force-overwrite"]
    return [*look, sys.executable, "-m", "bench.gpu.counters", "--step"]


def parse(text: str) -> list[dict[str, tuple[str, str]]]:
    """The metrics of each kernel, {name: (value, unit)}, from ncu's output with `--csv --page raw`:
    a header, a row of units, a row per kernel. Other output begins with ==."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    if len(lines) < 3:
        return []
    header, units, *rows = csv.reader(lines)
    return [
        {name: pair for name, *pair in zip(header, row, units, strict=False)} for row in rows
    ]  # fmt: skip


def chosen(metrics: dict[str, tuple[str, str]]) -> list[tuple[str, float, str]]:
    """The available metrics of METRICS: label, value, unit."""
    found = []
    for text, pattern in METRICS.items():
        matching = []
        for name, (value, unit) in metrics.items():
            try:
                number = float(value.replace(",", ""))
            except ValueError:
                continue
            if re.search(pattern, name):
                matching.append((name, number, unit))
        if text == "stalled for":
            matching.sort(key=lambda one: -one[1])
            names = [re.sub(r".*stalled_|_per_issue.*", "", one[0]) for one in matching]
            found += [
                (f"stalled for {name}", number, "warps")
                for name, (_, number, _) in list(zip(names, matching, strict=True))[:STALLS]
            ]
        elif matching:
            found.append((text, *matching[0][1:]))
    return found


def step() -> None:
    """One warm-up step of the Triton engine, then one that ncu profiles."""
    tiles.step("clip", N, tiles.D, "cuda")
    torch.cuda.profiler.start()
    tiles.step("clip", N, tiles.D, "cuda")
    torch.cuda.profiler.stop()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.counters")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=results.RESULTS)
    parser.add_argument("--step", action="store_true")
    options = parser.parse_args(arguments)
    if options.step:
        step()
        return 0
    ncu, raw = find(), options.out / "gpu-ncu.csv"
    raw.unlink(missing_ok=True)
    seen = []
    for kernel, pattern in KERNELS.items():
        target = options.out / "gpu-ncu.partial"
        seconds = max(1.0, (steps.seconds_left() - 5) / len(KERNELS))
        ended = process.run(command(ncu, pattern, target), seconds, print, grace=5)
        text = target.read_text() if target.exists() else ""
        target.unlink(missing_ok=True)
        with raw.open("a") as file:
            file.write(text)
        found = parse(text)
        if not found:
            reason = [line for line in text.splitlines() if "==ERROR==" in line] or [ended.last]
            print(f"FAILED: {kernel}: {reason[0]}", flush=True)
            continue
        seen.append(kernel)
        name = found[0].get("Kernel Name", ("?", ""))[0]
        print(f"{kernel}: {name[:70]}", flush=True)
        for text, value, unit in chosen(found[0]):
            row = {"step": "ncu", "subject": kernel, "name": text, "value": value, "unit": unit}
            figures.append(options.out / "gpu-figures.csv", row)
            print(f"  {text:28} {value:14.4g} {unit}", flush=True)
    print(f"{len(seen)} of {len(KERNELS)} kernels profiled; in {raw.name}")
    return 0 if len(seen) == len(KERNELS) else 1


if __name__ == "__main__":
    sys.exit(main())
