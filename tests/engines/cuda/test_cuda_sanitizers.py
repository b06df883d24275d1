"""The CUDA engine's kernels, emulated on the CPU: their results, also under sanitizers.

`emulation/cuda/driver.cpp` compares every operator with a dense float64 truth, with thread blocks
and threads in order and in reverse. Shared memory is NaN before every thread block, and buffers are
exactly as large as requested.
"""

import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from emulation.cuda.build import build, driver, units
from emulation.programs import CSRC, preprocessed, run

pytestmark = pytest.mark.minutes

BARRIER = re.compile(r"__syncthreads\(\);")


def assert_passes(sanitizer: str, *arguments: str) -> None:
    done = run(build(driver(), sanitizer), *arguments)
    assert done.returncode == 0 and " 0 failures" in done.stdout, done.stdout + done.stderr[-5000:]


def test_results() -> None:
    assert_passes("none")


def test_no_overrun_and_nothing_undefined() -> None:
    """Undefined behaviour includes misaligned vector accesses, which fail on a GPU."""
    assert_passes("address")


def test_no_race() -> None:
    assert_passes("thread", "quick")


def barriers() -> Iterator[tuple[Path, re.Match[str]]]:
    text = preprocessed(units(driver())[0])
    for path in sorted(CSRC.rglob("*.h")):
        if f'"csrc/{path.relative_to(CSRC)}"' in text:
            yield from ((path, match) for match in BARRIER.finditer(path.read_text()))


def test_no_barrier_is_superfluous(tmp_path: Path) -> None:
    """ThreadSanitizer reports a race if any one barrier is missing.

    Every barrier is therefore needed, and the sanitizer detects missing ones.
    """

    def what_is_reported(path: Path, barrier: re.Match[str]) -> tuple[str, str]:
        place = f"{path.name}:{barrier.string.count(chr(10), 0, barrier.start()) + 1}"
        csrc = tmp_path / place.replace(":", "-")
        shutil.copytree(CSRC, csrc)
        changed = barrier.string[: barrier.start()] + ";" + barrier.string[barrier.end() :]
        (csrc / path.relative_to(CSRC)).write_text(changed)
        return place, run(build(driver(csrc), "thread", csrc=csrc), "quick").stderr

    found = list(barriers())
    assert found
    build(driver(), "thread")  # the objects that all builds share
    with ThreadPoolExecutor(2) as pool:
        reports = dict(pool.map(lambda b: what_is_reported(*b), found))
    unnoticed = [
        place for place, text in reports.items() if "ThreadSanitizer: data race" not in text
    ]
    assert not unnoticed
