"""Runs a command within a time limit: at the limit it gets SIGINT, and SIGKILL if it goes on.

On SIGINT, as from Ctrl-C, Python and pytest print where they were. Each line of the command's
output is passed to `say`; the last one and the first few that report failures are returned.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GRACE = 20.0  # seconds between SIGINT and SIGKILL
MOST_FAILURES = 10


@dataclass(frozen=True)
class Ended:
    """How a command ended. `code` is negative if a signal ended it; `last` is the last line of its
    output that is not blank."""

    code: int
    in_time: bool
    last: str
    failures: tuple[str, ...] = ()


def run(
    command: Sequence[str],
    seconds: float,
    say: Callable[[str], None],
    environment: Mapping[str, str] | None = None,
    grace: float = GRACE,
) -> Ended:
    """Runs `command` in the repository's root, with `environment` added to this process's own."""
    # A process group of its own, so that the command's children end with it. Not a session of its
    # own: ending this process's session must end the command, too.
    group = (
        {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}
    )  # fmt: skip
    process = subprocess.Popen(
        list(command), cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", **group,
    )  # fmt: skip
    last, failures = [""], []

    def read() -> None:
        for line in process.stdout:
            line = line.rstrip("\n")
            last[0] = line if line.strip() else last[0]
            # The lines of pytest's summary start with these words, too.
            if line.startswith(("FAILED", "ERROR")) and len(failures) < MOST_FAILURES:
                failures.append(line)
            say(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    in_time = True
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        in_time = False
        _stop(process, grace)
    except BaseException:  # this process is interrupted
        _stop(process, grace)
        raise
    finally:
        _kill_group(process)  # children that outlive the command would keep the pipe open
        reader.join(5)
    return Ended(process.returncode, in_time, last[0].strip(), tuple(failures))


def _stop(process: subprocess.Popen[str], grace: float) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(grace)
    except subprocess.TimeoutExpired:
        _kill_group(process)
        process.wait()


def _kill_group(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
