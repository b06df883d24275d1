"""Runs steps in order under one deadline.

A step is a command or a function. It is recorded in the file of steps before it begins and after it
has ended, so that a cut run shows where it was. A step that fails, or exceeds its time, does not
stop the rest.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import figures, process

COLUMNS = ("step", "status", "seconds", "note")
# The exit status of a process that has lost the device and should be run again.
LOST_STATUS = 75
MOST_RUNS = 4
# Seconds held back from the last step: to kill it, if necessary, and for the report.
RESERVE = process.GRACE + 5

PASSED, FAILED, CUT, NOT_RUN, RUNNING = "passed", "FAILED", "cut", "not run", "running"


@dataclass
class Session:
    """One run of `make gpu`: its folder of files, its deadline, the environment of its commands."""

    out: Path
    ends: float  # by `clock`
    device: str = "cuda"
    again: bool = False
    bundle: Path | None = None
    winners: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic
    began: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M", time.gmtime()))
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def left(self) -> float:
        return self.ends - self.clock()

    def file(self, name: str) -> Path:
        """The path of a file of this run. A second run has files of its own."""
        return self.out / f"gpu-{'again-' if self.again else ''}{name}"

    def say(self, line: str) -> None:
        """Prints a line and appends it to the log."""
        print(line, flush=True)
        with self.file("log.txt").open("a") as log:
            log.write(f"{line}\n")


@dataclass(frozen=True)
class Outcome:
    """How a step ended."""

    step: str
    status: str
    seconds: float = 0.0
    note: str = ""
    failures: tuple[str, ...] = ()


Action = Callable[[Session, float], Outcome]


@dataclass(frozen=True)
class Step:
    """One step. `run` gets the session and its seconds; `unless` returns the reason, if any, why it
    cannot run here. The step is skipped if fewer than `least` seconds remain."""

    name: str
    seconds: float
    run: Action
    unless: Callable[[Session], str | None] = lambda session: None
    least: float = 10.0


def module(name: str, *arguments: str) -> Callable[[Session], list[str]]:
    """The command that runs a module of this package on the session's device and files."""

    def command(session: Session) -> list[str]:
        run = [sys.executable, "-m", f"bench.gpu.{name}", *arguments]
        return [*run, "--device", session.device, "--out", str(session.out)]

    return command


def commanded(
    name: str, command: Callable[[Session], Sequence[str]], until_cut: bool = False, **more: str
) -> Action:
    """The action of a step that runs a command. With `until_cut`, reaching the time limit is not a
    failure. A process that loses the device is run again while there is time."""

    def run(session: Session, seconds: float) -> Outcome:
        began = session.clock()
        for number in range(MOST_RUNS):
            left = seconds - (session.clock() - began)
            environment = {
                **session.environment, "FASTCLIP_BENCH_SECONDS": f"{left:.0f}",
                "FASTCLIP_BENCH_BEGAN": session.began, "FASTCLIP_BENCH_RUN": str(number), **more,
            }  # fmt: skip
            ended = process.run(command(session), left, session.say, environment)
            if ended.code != LOST_STATUS or session.clock() - began > seconds - 10:
                break
            session.say(f"{name}: the device is lost to this process; once more, in a new one")
        spent = session.clock() - began
        if not ended.in_time:
            status = CUT if until_cut and not ended.failures else FAILED
            note = f"not done in {seconds:.0f} s; {ended.last}"
        else:
            status = PASSED if ended.code == 0 else FAILED
            note = ended.last if ended.code == 0 else f"{ended.last} (ended with {ended.code})"
        return Outcome(name, status, spent, note, ended.failures)

    return run


def run_all(steps: Sequence[Step], session: Session) -> None:
    """Runs the steps; puts their outcomes into the session and its file of steps."""
    for step in steps:
        reason = step.unless(session)
        seconds = min(step.seconds, session.left - RESERVE)
        if reason is None and seconds < step.least:
            reason = "left out for time"
        if reason is not None:
            _note(session, Outcome(step.name, NOT_RUN, 0.0, reason))
            continue
        session.say(f"\n=== {step.name}, at most {seconds:.0f} s of {session.left:.0f} s left")
        _write(session, Outcome(step.name, RUNNING))
        began = session.clock()
        try:
            outcome = step.run(session, seconds)
        except Exception as error:  # a bug of this package must not end the run
            spent = session.clock() - began
            outcome = Outcome(step.name, FAILED, spent, figures.reason(error))
        except BaseException:  # the run is interrupted: record the step that it was in
            _note(session, Outcome(step.name, CUT, session.clock() - began, "interrupted"))
            raise
        _note(session, outcome)


def _note(session: Session, outcome: Outcome) -> None:
    session.outcomes.append(outcome)
    _write(session)
    took = f" in {outcome.seconds:.0f} s" if outcome.seconds else ""
    session.say(f"--- {outcome.step}: {outcome.status}{took}: {outcome.note[:300]}")


def _write(session: Session, running: Outcome | None = None) -> None:
    rows = [
        {"step": o.step, "status": o.status, "seconds": f"{o.seconds:.1f}", "note": o.note[:300]}
        for o in [*session.outcomes, *([running] if running else [])]
    ]
    figures.replace(session.file("steps.csv"), rows, COLUMNS)


def seconds_left() -> float:
    """The seconds that a step's process may take; without limit if it is run by hand."""
    return float(os.environ.get("FASTCLIP_BENCH_SECONDS", "inf"))


def run_number() -> int:
    """The number of earlier processes of this step that lost the device."""
    return int(os.environ.get("FASTCLIP_BENCH_RUN", "0"))
