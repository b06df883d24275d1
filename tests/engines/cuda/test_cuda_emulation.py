"""The CUDA emulation gives right results for right kernels and detects each kind of mistake.

Every test that runs the engine's kernels on a CPU relies on this.
"""

import pytest
from emulation.cuda.build import SELFTEST, build
from emulation.programs import run

BUILDS = [
    ("fibers", "none"),
    ("fibers", "address"),
    ("fibers", "thread"),
    ("threads", "none"),
    ("threads", "thread"),
]

RACE = "ThreadSanitizer: data race"
# For each mistake, the builds that detect it, and their messages.
NOTICED = {
    "race": [("fibers", "thread", RACE), ("threads", "thread", RACE)],
    "late race": [("fibers", "thread", RACE), ("threads", "thread", RACE)],
    # Shuffles order no memory on a GPU; between host threads they do, which hides this race.
    "warp race": [("fibers", "thread", RACE)],
    "global race": [("fibers", "thread", RACE), ("threads", "thread", RACE)],
    "overrun": [("fibers", "address", "heap-buffer-overflow")],
    "shared overrun": [("fibers", "address", "insufficient space for an object")],
    "misaligned": [("fibers", "address", "misaligned address")],
    "divergent barrier": [("fibers", "none", "no thread can go on")],
    "two barriers": [("fibers", "none", "wait at different barriers")],
    "returned lane": [
        ("fibers", "none", "names a lane that has returned"),
        ("threads", "none", "names a lane that has returned"),
    ],
    "foreign lane": [("fibers", "none", "reads a lane that its mask does not name")],
    "two shuffles": [("fibers", "none", "in different calls")],
    "unwritten": [("fibers", "none", "before it was written")],
}


@pytest.mark.parametrize("scheduler, sanitizer", BUILDS)
def test_right_kernels(scheduler: str, sanitizer: str) -> None:
    done = run(build(SELFTEST, sanitizer, scheduler))
    assert done.returncode == 0 and done.stdout == "passed\n", done.stderr[-5000:]


@pytest.mark.parametrize(
    "mistake, scheduler, sanitizer, report",
    [(mistake, *who) for mistake, noticed in NOTICED.items() for who in noticed],
)
def test_mistakes(mistake: str, scheduler: str, sanitizer: str, report: str) -> None:
    done = run(build(SELFTEST, sanitizer, scheduler), mistake)
    assert done.returncode != 0 and report in done.stderr, done.stdout + done.stderr[-5000:]


def test_places_are_named() -> None:
    """The report of a barrier that not all threads reach names the place of every thread."""
    done = run(build(SELFTEST), "divergent barrier")
    for text in ("100 waiting", "at __syncthreads", "28 waiting", "at a vote", "mistakes.cpp:"):
        assert text in done.stderr, done.stderr
