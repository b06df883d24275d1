"""The CPU engine without torch, on threads that wait at random: the order of its threads, threads
that fail, and both under sanitizers.

`emulation/cpu/driver.cpp` compares the bits of all results with those of one thread, and makes
allocations and products fail. Its products are plain loops and its threads are the C++ library's,
so that sanitizers see every access and every wait.
"""

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from emulation.cpu.build import CAPABILITIES, build
from emulation.programs import CSRC, run

pytestmark = pytest.mark.minutes

# The largest instruction set of this machine.
MACHINE = torch.backends.cpu.get_cpu_capability()
BUILDS = [(sanitizer, "DEFAULT") for sanitizer in ("none", "address", "thread")]
BUILDS += [pytest.param("address", name, marks=pytest.mark.sanitize) for name in ("AVX2", "AVX512")]
RACE = "ThreadSanitizer: data race"


def supported(capability: str) -> bool:
    every = list(CAPABILITIES)
    if capability not in every:
        return False
    return MACHINE not in every or every.index(capability) <= every.index(MACHINE)


@pytest.mark.parametrize("what", ["results", "failures"])
@pytest.mark.parametrize("sanitizer, capability", BUILDS)
def test_nothing_is_found(sanitizer: str, capability: str, what: str) -> None:
    if not supported(capability):
        pytest.skip(f"this machine has no {capability}")
    done = run(build(sanitizer, capability), what, "1", "10", seconds=120)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    cases = int(done.stdout.split()[0])
    assert cases >= 5 and done.stdout.endswith(" cases, 0 failures\n"), done.stdout


class Mistake(NamedTuple):
    """A change of a file of csrc/cpu, the build and the check that notice it, and the report."""

    file: str
    right: str
    wrong: str
    sanitizer: str
    what: str
    reports: tuple[str, ...]


WAIT = "passed_[j].load(std::memory_order_acquire) < k;"
PASS = "passed_[j].store(k + 1, std::memory_order_release);"
CHANGES_BITS = "threads change the bits"
HANGS = "the engine hangs"  # after ten seconds, not for ever
FAILED = 'if (failed_) throw std::runtime_error("another thread of the engine failed");'

MISTAKES = {
    "a strip overtakes another": Mistake(
        "engine.cpp", WAIT, WAIT.replace("< k", "< k - 1"), "none", "results", (CHANGES_BITS, HANGS)
    ),
    "no strip waits": Mistake(
        "engine.cpp", WAIT, WAIT.replace("< k", "< 0"), "none", "results", (CHANGES_BITS,)
    ),
    "a failed thread is silent": Mistake(
        "engine.cpp", "failed_ = true;", "", "none", "failures", (HANGS,)
    ),
    "nobody looks for a failed thread": Mistake(
        "engine.cpp", FAILED, "", "none", "failures", (HANGS,)
    ),
    "an error is lost": Mistake(
        "engine.cpp", "if (error_) std::rethrow_exception(error_);", "", "none", "failures",
        ("got none",),
    ),
    "no acquire": Mistake(
        "engine.cpp", WAIT, WAIT.replace("acquire", "relaxed"), "thread", "results", (RACE,)
    ),
    "no release": Mistake(
        "engine.cpp", PASS, PASS.replace("release", "relaxed"), "thread", "results", (RACE,)
    ),
    "a row too many": Mistake(
        "engine.cpp", "cols = std::min(tile_, p_.y.rows - begin);", "cols = tile_;", "address",
        "results", ("heap-buffer-overflow",),
    ),
    "too little scratch": Mistake(
        "row_strip.h", "arena.take<T>(3 * lanes)", "arena.take<T>(2 * lanes)", "address", "results",
        ("use-after-poison",),
    ),
    "misaligned pieces": Mistake(
        "arena.h", "used_ += round_up(count * int64_t(sizeof(T)), 64)",
        "used_ += count * int64_t(sizeof(T)) + 1", "address", "results", ("misaligned address",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_noticed(name: str, tmp_path: Path) -> None:
    mistake = MISTAKES[name]
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    changed = csrc / "cpu" / mistake.file
    text = changed.read_text()
    assert text.count(mistake.right) == 1
    changed.write_text(text.replace(mistake.right, mistake.wrong))
    done = run(build(mistake.sanitizer, csrc=csrc), mistake.what, "1", "10", seconds=120)
    said = done.stdout + done.stderr
    assert done.returncode != 0 and any(report in said for report in mistake.reports), said[-5000:]
