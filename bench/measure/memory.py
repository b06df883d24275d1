"""Peak memory of one method on one case; on a CPU in a process of its own.

On a CPU it is the process's high-water mark of resident memory less the level before the run, so
that allocations of the C++ engine, oneDNN or compiled code count like torch's own tensors. Writing
5 to /proc/self/clear_refs resets the mark. On a GPU it is the peak of torch's allocator, which
counts only this process, so that no other process is needed. Nothing is timed here.

    python -m bench.measure.memory '{"loss": "clip", "m": 512, ...}' METHOD DEVICE
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ..case import Case
from ..cases import make_inputs
from ..methods.step import make_step

ROOT = Path(__file__).resolve().parents[2]
WARM_UP_PAIRS = 64
LONGEST = 1800  # seconds a process may take


def peak_bytes(run: Callable[[], object]) -> int | None:
    """The bytes by which resident memory rises above its level while `run` runs.

    None if that is unknown: without /proc, or if the high-water mark cannot be reset and was
    already higher than `run` takes it.
    """
    gc.collect()
    # Otherwise the run's tensors could reuse free memory that the allocator holds, uncounted.
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    # If this is not permitted the mark stays; `before` shows if it then hides the run.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    try:
        level, before = _status("VmRSS"), _status("VmHWM")
    except (OSError, KeyError):
        return None
    run()
    mark = _status("VmHWM")
    if mark == before and before > level + 2**20:
        return None
    return max(0, mark - level)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields[key].split()[0]) * 1024


def peak_of_step(case: Case, method: str, device: str) -> int | None:
    """Bytes beyond the inputs, gradients included; in this process, which should be a fresh one."""
    inputs = make_inputs(case, device)
    if method == "compiled":  # only the same shape compiles the code that is measured
        warm = make_step(case, method, inputs)
    else:
        small = min(WARM_UP_PAIRS, case.m)
        few = replace(case, m=small, n=small if case.square else 2 * small)
        warm = make_step(few, method, make_inputs(few, device))
    warm()
    step = warm if method == "compiled" else make_step(case, method, inputs)
    results: list[object] = []  # the gradients live until the mark has been read
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        level = torch.cuda.memory_allocated()
        results.append(step())
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - level
    return peak_bytes(lambda: results.append(step()))


def measure(case: Case, method: str, device: str = "cpu") -> tuple[int | None, str]:
    """`peak_of_step`, on a CPU in a fresh process: (bytes, "") or (None, the reason)."""
    if device == "cuda":
        try:
            return peak_of_step(case, method, device), ""
        except Exception as error:  # out of memory, most likely
            return None, f"memory: {type(error).__name__}"
    return in_fresh_process("bench.measure.memory", json.dumps(asdict(case)), method, device)


def in_fresh_process(module: str, *arguments: str) -> tuple[int | None, str]:
    """The number of bytes that a module prints in its last line, as JSON: (bytes, ""), or (None,
    the reason) if it prints null, fails or takes longer than LONGEST."""
    # `-m` finds this package through the working directory, which PYTHONSAFEPATH would exclude.
    environment = {**os.environ, "PYTHONSAFEPATH": ""}
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments], cwd=ROOT, env=environment,
            capture_output=True, text=True, timeout=LONGEST,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, f"memory: not done in {LONGEST} s"
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or [f"ended with {done.returncode}"]
        return None, f"memory: {reason[0]}"
    peak = json.loads(done.stdout.splitlines()[-1])
    return peak, "" if peak is not None else "memory: cannot be measured on this machine"


def main() -> None:
    fields = json.loads(sys.argv[1])
    case = Case(**{**fields, "methods": tuple(fields["methods"])})
    print(json.dumps(peak_of_step(case, *sys.argv[2:4])))


if __name__ == "__main__":
    main()
