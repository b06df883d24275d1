"""Checks every engine against float64 on the device, in a minute: `python -m bench.gpu.smoke`.

`smoke_checks.py` has the problems and the verdicts. Each engine, loss and dtype has a process of
its own. Several run at once, because they spend most of their time compiling.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from ..losses import LOSSES
from ..measure.timing import wait_for
from ..methods import registry
from ..report import results
from . import figures, fp32, process, steps, winners
from .smoke_checks import (
    DTYPES,
    LARGE,
    checks,
    judge,
    judge_graph,
    judge_kept,
    judge_masked,
    judge_rerun,
)

COLUMNS = ("engine", "loss", "dtype", "normalize", "n", "d", "scale", "check", "status",
           "worst", "of", "note")  # fmt: skip
PROCESSES = 8
LEAST_SECONDS = 3.0  # no process is started with less time left
FILE = "gpu-smoke.csv"


JUDGES = {
    "accuracy": judge, "rerun": judge_rerun, "kept": judge_kept, "graph": judge_graph,
    "masked": judge_masked,
}  # fmt: skip


@contextlib.contextmanager
def engine_of(label: str, tiles: Path | None) -> Iterator[str]:
    """The backend of a label such as "triton" or "cuda tf32", in the mode of its second word."""
    backend, _, mode = label.partition(" ")
    settings = {
        "fused": registry.fused_tiles,
        "split": fp32.split,
        "tf32": partial(fp32.precision, "tf32"),
        "winners": lambda: winners.applied(winners.better_of(tiles)),
    }
    with settings.get(mode, contextlib.nullcontext)():
        yield backend


def work(label: str, loss: str, dtype: str, device: str, path: Path, tiles: Path | None) -> int:
    """Makes all checks of one process; returns its exit status."""
    with engine_of(label, tiles) as engine:
        for problem, check in checks(loss, dtype, device):
            row = {
                "engine": label, "loss": loss, "dtype": dtype, "normalize": problem.normalize,
                "n": problem.n, "d": problem.d, "scale": problem.scale, "check": check,
            }  # fmt: skip
            try:
                row.update(JUDGES[check](problem, engine))
            except Exception as error:
                row.update(status="FAILED", note=figures.reason(error))
            figures.append(path, row, COLUMNS)
            try:
                wait_for(device)
            except RuntimeError:  # all later checks would fail as well
                return steps.LOST_STATUS
    return 0


def engines(device: str) -> list[str]:
    """The engines that can run here, with their modes; the CUDA engine's fused tiles are
    experimental."""
    import fastclip

    names = ("triton", "cuda") if device == "cuda" else ("cpu", "torch")
    found = [name for name in names if fastclip.backends()[name] == "available"]
    tf32 = [f"{name} tf32" for name in found] if device == "cuda" else []
    if "triton" in found:
        found.append("triton split")
    if "cuda" in found and registry.fused_is_built():
        found.append("cuda fused")
    return [*found, *tf32]  # tf32 comes last, since no case is timed in it


def jobs(labels: list[str]) -> list[tuple[str, str, str]]:
    """The (engine, loss, dtype) of each process, bf16 first."""
    # Tile candidates are timed only in bf16; the fused kernels take only half precision; only fp32
    # is split or rounded to tf32.
    only = {
        "winners": ("bfloat16",),
        "split": ("float32",),
        "tf32": ("float32",),
        "fused": ("bfloat16", "float16"),
    }
    return [
        (label, loss, dtype)
        for dtype in DTYPES
        for label in labels
        for loss in LOSSES
        if dtype in only.get(label.partition(" ")[2], DTYPES)
    ]


def run_job(
    job: tuple[str, str, str], options: argparse.Namespace, path: Path, ends: float
) -> None:
    """Makes the checks of one job in a process of its own. If it fails, or is killed at the end of
    the time, a row says so."""
    label, loss, dtype = job
    command = [sys.executable, "-m", "bench.gpu.smoke", "--job", *job, "--device", options.device]
    command += ["--out", str(options.out), "--file", options.file]
    command += ["--winners", str(options.winners)] if options.winners else []
    row = {"engine": label, "loss": loss, "dtype": dtype, "check": "process", "status": "FAILED"}
    seconds = ends - time.monotonic()
    if seconds < LEAST_SECONDS:  # neither a crash nor a hang: the engine stays usable
        counts = {"check": "large"} if dtype == "bfloat16" else {"status": "cut"}
        figures.append(path, {**row, **counts, "note": "left out for time"}, COLUMNS)
        return
    child = subprocess.Popen(command, cwd=process.ROOT, stdin=subprocess.DEVNULL)
    try:
        code = child.wait(seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        # Compiling takes time, but a process without a single check counts as hung.
        checked = [r for r in figures.read(path) if job == (r["engine"], r["loss"], r["dtype"])]
        note = f"not done in {seconds:.0f} s"
        if dtype == "bfloat16" and not any(r["n"] == str(LARGE[0]) for r in checked):
            note = f"CUT before {LARGE[0]} x {LARGE[1]}, {note}"
            row["check"] = "large" if checked else "process"
        elif checked:
            row["status"] = "cut"
        figures.append(path, {**row, "note": note}, COLUMNS)
        return
    if code:
        figures.append(path, {**row, "note": f"ended with {code}"}, COLUMNS)


def unusable(rows: list[dict[str, str]]) -> list[str]:
    """Engines that must not be timed: their process in bf16, or in split fp32, crashed or hung."""
    return sorted({
        row["engine"] for row in rows if (row["check"], row["status"]) == ("process", "FAILED")
        and (row["dtype"] == "bfloat16" or row["engine"] == "triton split")
    })  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.smoke")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=results.RESULTS)
    parser.add_argument("--file", default=FILE)
    parser.add_argument("--engines", nargs="*", help="default: all that are available")
    parser.add_argument("--winners", type=Path, help="a file of tile candidates")
    parser.add_argument("--job", nargs=3, metavar=("ENGINE", "LOSS", "DTYPE"))
    options = parser.parse_args(arguments)
    path = options.out / options.file
    if options.job:
        return work(*options.job, options.device, path, options.winners)
    figures.start(path, COLUMNS)
    # A killed process may take seconds to release its device memory.
    ends = time.monotonic() + min(steps.seconds_left() - 6, 1e6)
    todo = jobs(engines(options.device) if options.engines is None else options.engines)
    if not todo:
        print("FAILED: no engine is available")
        return 1
    with ThreadPoolExecutor(min(PROCESSES, os.cpu_count() or 1)) as pool:
        for _ in pool.map(lambda job: run_job(job, options, path, ends), todo):
            pass
    rows = figures.read(path)
    for message in summary(rows):
        print(message, flush=True)
    return 1 if any(row["status"] == "FAILED" for row in rows) else 0


def summary(rows: list[dict[str, str]], most: int = 12) -> list[str]:
    """The first `most` failures, then a line that counts all checks by engine."""
    failed = [row for row in rows if row["status"] == "FAILED"]
    messages = [
        "FAILED: " + " ".join(
            row[name] for name in ("engine", "loss", "dtype", "normalize", "n", "d", "scale",
                                   "check", "of", "note") if row[name]
        ) for row in failed[:most]
    ]  # fmt: skip
    if len(failed) > most:
        messages.append(f"... and {len(failed) - most} more of {FILE}")
    told = []
    for engine in dict.fromkeys(row["engine"] for row in rows):
        counts = Counter(row["status"] for row in rows if row["engine"] == engine)
        cut = f", {counts['cut']} processes cut" if counts["cut"] else ""
        told.append(f"{engine} {counts['passed']} passed, {counts['FAILED']} failed{cut}")
    return [*messages, "; ".join(told) or "nothing was checked"]


if __name__ == "__main__":
    sys.exit(main())
