"""The trial of one mutant: apply it to a copy of the tree, build, run its tests, and take it out.

Tests run in a process of their own without files of bytecode: Python tells a changed module by its
time in seconds and its size, and a mutant may keep both.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from mutants.mutant import DoesNotApply, Mutant

# For the tests of one mutant, which take a few on an idle machine; for one that should hang.
SECONDS, SECONDS_OF_HANGING = 300, 120
PYTEST = ("-m", "pytest", "-x", "-q", "--tb=line", "-p", "no:cacheprovider")


class Verdict(Enum):
    KILLED = "killed"
    SURVIVED = "SURVIVED"
    TIMED_OUT = "TIMED OUT"
    DID_NOT_APPLY = "DID NOT APPLY"
    DID_NOT_BUILD = "DID NOT BUILD"
    DID_NOT_RUN = "DID NOT RUN"  # pytest could not collect or found no test


class Outcome(NamedTuple):
    verdict: Verdict
    seconds: float
    said: str = ""  # the test that failed, or what went wrong


class Build(NamedTuple):
    """The needs of an area's tests: functions of the tree and a changed path (None: nothing)."""

    make: Callable[[Path, str | None], None]
    undo: Callable[[Path], None] = lambda tree: None


class DoesNotBuild(Exception):
    """The compiler refuses the mutant, which therefore says nothing about the tests."""


def trial(
    mutant: Mutant, tree: Path, build: Build | None = None, seconds: float = SECONDS
) -> Outcome:
    """Tries a mutant in a copy of the tree, which is then as it was."""
    began = time.monotonic()
    if mutant.hangs:
        seconds = min(seconds, SECONDS_OF_HANGING)

    def outcome(verdict: Verdict, said: str = "") -> Outcome:
        return Outcome(verdict, time.monotonic() - began, said)

    try:
        text = mutant.apply(tree)
    except DoesNotApply as reason:
        return outcome(Verdict.DID_NOT_APPLY, str(reason))
    try:
        if build:
            build.make(tree, mutant.path)
        code, output = run_tests(mutant.tests, tree, seconds)
    except DoesNotBuild as reason:
        return outcome(Verdict.DID_NOT_BUILD, str(reason))
    except subprocess.TimeoutExpired:
        return outcome(Verdict.KILLED if mutant.hangs else Verdict.TIMED_OUT, f"{seconds:g} s")
    finally:
        (tree / mutant.path).write_text(text)
        if build:
            build.undo(tree)
    if code == 0:
        return outcome(Verdict.SURVIVED)
    if code == 1:
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", output, re.MULTILINE)
        return outcome(Verdict.KILLED, failed[1] if failed else "")
    if code < 0:
        return outcome(Verdict.KILLED, f"{signal.Signals(-code).name} ended the tests")
    return outcome(Verdict.DID_NOT_RUN, output[-2000:])


def run_tests(tests: Sequence[str], tree: Path, seconds: float) -> tuple[int, str]:
    """Runs tests in a tree; returns pytest's exit status and output.

    Raises subprocess.TimeoutExpired, once the tests and their processes have been ended.
    """
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    with subprocess.Popen(
        [sys.executable, *PYTEST, *tests], cwd=tree, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, output
