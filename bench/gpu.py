"""The loss tests and a short bench on a CUDA device: `make gpu`, with the machine's own packages.

The bench is `runner` on `cases.gpu`, within a time; its CSV goes to $OUT, or to bench/results. What
needs a package that is missing is not run and named. With the installation before it all of this
stays within eight minutes. This file installs nothing and measures nothing itself.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from . import cases, results, runner, table

ROOT = Path(__file__).resolve().parents[1]


def _files(*promises: str) -> tuple[str, ...]:
    return tuple(f"tests/test_{promise}.py" for promise in promises)


# What only a card can show, to the end; then the losses' own tests, thousands of small kernels to
# compile, as far as the time goes.
CARD_TESTS = _files(
    "gpu", "gpu_engine_blocks", "gpu_engine_switch", "gpu_engine_finish", "gpu_engine_operators",
    "errors",
)  # fmt: skip
LOSS_TESTS = _files(
    "determinism", "gradients_requested", "shapes", "parts_of_a_block", "kept_products", "blocks",
    "accuracy",
)  # fmt: skip
TEST_PACKAGES = ("pytest", "numpy")
CARD_SECONDS, LOSS_SECONDS, BENCH_SECONDS, TILE_SECONDS, CASE_SECONDS = 200, 70, 110, 40, 0.7


def missing(packages: Iterable[str]) -> list[str]:
    """A reason for each package that is not installed."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return [f"{name} is not installed" for name in absent]


def run_tests(command: list[str], seconds: float = CARD_SECONDS, to_the_end: bool = True) -> str:
    """Runs tests on the device in a process of their own; how they ended."""
    if reasons := missing(TEST_PACKAGES):
        return f"not run: {', '.join(reasons)}"
    # Safe path: `-m` would else put the root, and with it triton_kernels/, on sys.path.
    environment = {**os.environ, "FASTCLIP_TEST_DEVICE": "cuda", "PYTHONSAFEPATH": "1"}
    try:
        code = subprocess.run(command, cwd=ROOT, env=environment, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        return f"FAILED: not done in {seconds} s" if to_the_end else f"passed for {seconds} s"
    return "passed" if code == 0 else f"FAILED: pytest ended with {code}"


def bench(plan: list[cases.Case], device: str) -> tuple[list[results.Row], Path]:
    """The rows, those of methods that did not run among them, and the file they are in."""
    folder = Path(os.environ.get("OUT") or results.RESULTS)
    path = folder / f"{results.machine_row(device).machine}.csv"
    options = runner.Options(path, CASE_SECONDS, device, at_most=BENCH_SECONDS)
    return runner.run(plan, options), path


def time_tiles(path: Path) -> str:
    """The Triton engine's candidates, in a process of their own; how that ended."""
    target = path.with_name(f"{path.stem}-tiles.csv")
    command = [sys.executable, "-m", "bench.tiles", str(target)]
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=TILE_SECONDS).returncode
    except subprocess.TimeoutExpired:
        return f"not done in {TILE_SECONDS} s"
    return f"in {target}" if code == 0 else f"not timed: the process ended with {code}"


def broken(rows: list[results.Row]) -> list[results.Row]:
    """Rows of our own that should have a time and have none."""
    own = (row for row in rows if row.method.startswith("fastclip") and row.mode != "skipped")
    return [row for row in own if row.ms is None]


def report(tests: str, rows: list[results.Row], path: Path, tiles: str = "not timed") -> str:
    """How all of it ended, the table last."""
    lines = [f"not run: {row.note}" for row in rows if row.mode == "skipped"]
    lines += [f"FAILED: {row.method} on {row.loss} {row.n}: {row.note}" for row in broken(rows)]
    lines += [f"tests on the device: {tests}", f"rows in {path}", f"tiles: {tiles}"]
    return "\n".join([*lines, "", table.provenance(rows), "", table.brief(rows)])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only tell whether there is a GPU")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"make gpu: torch {torch.__version__} finds no CUDA device here", file=sys.stderr)
        return 2
    if options.check:
        return 0

    import fastclip

    for name, state in fastclip.backends().items():
        print(f"engine {name}: {state}", flush=True)
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    tests = run_tests([*pytest, *CARD_TESTS])
    of_losses = run_tests([*pytest, "--exitfirst", *LOSS_TESTS], LOSS_SECONDS, to_the_end=False)
    tests += f"; of the losses: {of_losses}"
    rows, path = bench(cases.gpu(), "cuda")
    state = fastclip.backends()["triton"]
    tiles = time_tiles(path) if state == "available" else f"not timed: {state}"
    print(f"\n{report(tests, rows, path, tiles)}")
    return 1 if "FAILED" in tests or broken(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
