"""Times the Triton engine's tile candidates in turns: `python -m bench.gpu.tiles`.

Each loss runs at 32,768 x 768 in bf16. When the engine asks its table for a kernel's tiles, all
candidates run: each once, to compile it, then in rounds, so that clocks and other load affect them
alike. Before that, parallel processes fill Triton's cache. A candidate that fails gets a row with
its message; a candidate that ended its process is not tried again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..cases import Case, make_inputs
from ..losses import LOSSES, loss_of
from ..measure.runner import DeviceLost
from ..measure.timing import CLOCKS, wait_for
from ..methods.passes import bytes_of_everything
from ..report import results
from . import figures, process, steps

FILE = "gpu-tiles.csv"
N, D = 32768, 768
# The size used for compiling: small, but large enough not to select the kernels of small blocks.
SMALL = 4096
PROCESSES = 12
ROUNDS, SECONDS = 7, 8.0  # the most for the candidates of one kernel
COMPILING_SECONDS = 60.0
DID_NOT_RETURN = "did not return"

# The arguments of `configurations.choose` between the device and the function that runs the kernel.
KEY = ("dtype", "tf32", "d", "unit", "kernel")
Choose = Callable[..., Any]


@contextlib.contextmanager
def choosing(hook: Callable[[Choose, tuple[object, ...]], Any]) -> Iterator[None]:
    """Replaces `configurations.choose` by the hook, which gets the original function and its
    arguments: a device, those of KEY and, for kernels that can be timed, a function to run them."""
    from fastclip.triton_kernels import configurations

    own = configurations.choose
    configurations.choose = lambda *arguments: hook(own, arguments)
    try:
        yield
    finally:
        configurations.choose = own


def key_of(arguments: tuple[object, ...]) -> tuple[str, ...]:
    return tuple(str(value) for value in arguments[1 : 1 + len(KEY)])


def run_of(arguments: tuple[object, ...]) -> Callable[[Any], object] | None:
    return arguments[1 + len(KEY)] if len(arguments) > 1 + len(KEY) else None


def step(loss: str, n: int, d: int, device: str, keeps: bool = False) -> None:
    """One step, forward and backward, of the Triton engine; it keeps all products or none."""
    case = Case(loss, n, n, d, "bfloat16", 14.3)
    inputs = make_inputs(case, device)
    budget = bytes_of_everything(case) if keeps else 0
    value = loss_of(loss).of_fastclip()(
        inputs.x, inputs.y, inputs.scale, inputs.bias, backend="triton", memory_budget=budget
    )
    value.backward()
    wait_for(device)


def all_steps(n: int, d: int, device: str) -> None:
    """Runs steps that together use every kernel of the engine."""
    for loss in LOSSES:
        step(loss, n, d, device)
    for loss, known in LOSSES.items():
        if not known.in_one_go:
            step(loss, n, d, device, keeps=True)


class Candidates:
    """The rows of the file of candidates, and the hook that times them."""

    def __init__(self, path: Path, device: str, n: int) -> None:
        self.path, self.device, self.n = path, device, n
        self.rows: dict[tuple[tuple[str, ...], tuple[str, ...]], dict[str, object]] = {}
        self.fields: list[str] = []
        self.crashed = {
            (*(row[name] for name in KEY), row["config"])
            for row in figures.read(path) if row["note"].startswith(DID_NOT_RETURN)
        }  # fmt: skip
        self.done: set[tuple[str, ...]] = set()

    def choose(self, own: Choose, arguments: tuple[object, ...]) -> Any:
        from fastclip.triton_kernels import configurations

        default = own(*arguments[: 1 + len(KEY)])
        run, key = run_of(arguments), key_of(arguments)
        if run is not None and key not in self.done:
            self.done.add(key)
            self.time(key, run, configurations.candidates(default, key[-1]))
        return default

    def time(self, key: tuple[str, ...], run: Callable[[Any], object], found: list[Any]) -> None:
        """Times the candidates of one kernel, the table's own choice first, into rows."""
        self.fields = list(found[0]._fields)
        rows = {
            config: dict(zip(KEY, key, strict=True)) | {
                "config": str(tuple(config)), "default": int(place == 0), "n": self.n, "ms": "",
                "rounds": 0, "note": "", **config._asdict(),
            } for place, config in enumerate(found)
        }  # fmt: skip
        for config, row in rows.items():
            self.rows[key, tuple(map(str, config))] = row
        alive = [config for config, row in rows.items() if self._first_run(run, config, row)]
        times: dict[Any, list[float]] = {config: [] for config in alive}
        began = time.monotonic()
        for turn in range(ROUNDS):
            if turn >= 3 and time.monotonic() - began > SECONDS:
                break
            for config in alive:
                milliseconds = 1e3 * CLOCKS[self.device](lambda c=config: run(c), 1)
                times[config].append(milliseconds)
                rows[config].update(ms=statistics.median(times[config]), rounds=turn + 1)
            self.write()
        self._tell(key, rows)

    def _first_run(self, run: Callable[[Any], object], config: Any, row: dict[str, object]) -> bool:
        if (*(str(row[name]) for name in KEY), row["config"]) in self.crashed:
            row["note"] = f"{DID_NOT_RETURN}: its process ended with it"
            return False
        row["note"] = DID_NOT_RETURN
        self.write()
        try:
            run(config)
            wait_for(self.device)
        except Exception as error:  # no room, no such tile, a compiler that fails
            row["note"] = figures.reason(error)
            self.write()
            try:
                wait_for(self.device)
            except RuntimeError:
                row["note"] = f"{DID_NOT_RETURN}: {row['note']}"
                self.write()
                raise DeviceLost from error
            return False
        row["note"] = ""
        return True

    def write(self) -> None:
        columns = [*KEY, *self.fields, "n", "default", "ms", "rounds", "note", "config"]
        figures.replace(self.path, self.rows.values(), columns)

    def _tell(self, key: tuple[str, ...], rows: dict[Any, dict[str, object]]) -> None:
        timed = [(row["ms"], config) for config, row in rows.items() if row["rounds"]]
        default = next(iter(rows.values()))
        if not timed:
            print(f"{key[-1]}: none of {len(rows)} candidates ran: {default['note']}", flush=True)
            return
        best, config = min(timed)
        own = f"{default['ms']:.3f} ms" if default["rounds"] else default["note"]
        told = f"{len(timed)} of {len(rows)} candidates ran; {tuple(config)} {best:.3f} ms"
        print(f"{key[-1]}: {told}; the table's {own}", flush=True)


def compile_share(index: int, of: int, device: str) -> None:
    """Compiles every `of`-th candidate into Triton's cache, by running it on a small block."""

    def choose(own: Choose, arguments: tuple[object, ...]) -> Any:
        from fastclip.triton_kernels import configurations

        default = own(*arguments[: 1 + len(KEY)])
        if (run := run_of(arguments)) is not None:
            for config in configurations.candidates(default, str(arguments[len(KEY)]))[index::of]:
                with contextlib.suppress(Exception):
                    run(config)
        return default

    with choosing(choose):
        all_steps(SMALL, D, device)


def compile_all(device: str, seconds: float) -> None:
    count = min(PROCESSES, os.cpu_count() or 1)
    command = [sys.executable, "-m", "bench.gpu.tiles", "--device", device, "--share"]
    children = [
        subprocess.Popen(
            [*command, str(index), str(count)], cwd=process.ROOT, stderr=subprocess.DEVNULL
        )
        for index in range(count)
    ]
    ends = time.monotonic() + seconds
    for child in children:
        try:
            child.wait(max(0.1, ends - time.monotonic()))
        except subprocess.TimeoutExpired:  # the rest is compiled when it is first timed
            child.kill()
            child.wait()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.tiles")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=results.RESULTS)
    parser.add_argument("--share", nargs=2, type=int, metavar=("INDEX", "OF"))
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    if options.share:
        compile_share(*options.share, options.device)
        return 0
    began = time.monotonic()
    compile_all(options.device, min(COMPILING_SECONDS, steps.seconds_left() / 2))
    print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
    path = options.out / FILE
    if steps.run_number() == 0:
        path.unlink(missing_ok=True)
    found = Candidates(path, options.device, N)
    try:
        with choosing(found.choose):
            all_steps(N, D, options.device)
    except DeviceLost:
        return steps.LOST_STATUS
    ran = sum(bool(row["rounds"]) for row in found.rows.values())
    print(f"{ran} of {len(found.rows)} candidates timed; in {FILE}")
    return 0 if ran else 1


if __name__ == "__main__":
    sys.exit(main())
