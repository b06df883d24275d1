"""Commands of `make gpu`: what they print, how they end, and the tests' command lines."""

import signal
import sys
import time
from pathlib import Path

import pytest
from support.bench import importing  # noqa: F401 -- makes `bench` importable

from bench.gpu import process, suite


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_command_says_what_it_prints_and_how_it_ended():
    lines: list[str] = []
    code = "import os, sys; print('FAILED: one'); print(os.environ['GIVEN'], file=sys.stderr)"
    ended = process.run(python(f"{code}; sys.exit(3)"), 60, lines.append, {"GIVEN": "last  "})
    assert ended == process.Ended(3, True, "last", ("FAILED: one",))
    assert lines == ["FAILED: one", "last  "]


def shell(code: str) -> list[str]:
    """A shell command: unlike Python, a shell starts at once, even on a busy machine."""
    return ["sh", "-c", code]


def test_at_the_end_of_its_time_a_command_may_print_where_it_was():
    lines: list[str] = []
    code = "trap 'echo here; exit 3' INT; echo begun; sleep 60 & wait"
    ended = process.run(shell(code), 1.0, lines.append)
    assert ended == process.Ended(3, False, "here") and lines == ["begun", "here"]


def is_gone(pid: int) -> bool:
    """True if the process ends within five seconds: gone, or a zombie not yet reaped."""
    state = Path(f"/proc/{pid}/stat")
    for _ in range(50):
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize(("ends_with", "code"), [("trap '' INT; wait", -signal.SIGKILL), (":", 0)])
def test_no_child_outlives_a_command(ends_with, code):
    """The command is killed, or leaves a child behind that keeps the pipe open."""
    lines: list[str] = []
    began = time.monotonic()
    command = shell(f"sleep 60 & echo $!; {ends_with}")
    ended = process.run(command, 1.0, lines.append, grace=0.5)
    assert (ended.code, ended.in_time) == (code, code == 0)
    assert is_gone(int(lines[0])) and time.monotonic() - began < 30


def test_command_lines_of_the_groups_of_tests(monkeypatch):
    card = suite.command("card")
    assert "--continue-on-collection-errors" in card and "not sanitizer" in " ".join(card)
    assert card[-len(suite.GROUPS["card"]) :] == list(suite.GROUPS["card"])
    assert suite.GROUPS["card"][0] == "tests/engines/gpu/test_gpu.py"
    assert "tests/engines/triton/test_split_products.py" in card
    assert (
        "tests/engines/gpu/test_gpu_engine_blocks.py" in card
        and "tests/losses/test_errors.py" in card
    )
    assert len(suite.GROUPS["losses"]) == 7, "every file exists"
    sanitizers = suite.command("sanitizers")
    assert sanitizers[sanitizers.index("-m", 3) + 1] == "sanitizer"
    installed = {"xdist", "pytest"}
    monkeypatch.setattr(suite.importlib.util, "find_spec", lambda name: name in installed or None)
    assert "-n" in suite.command("card") and "-n" not in suite.command("sanitizers")
    assert suite.missing() == "numpy not installed"
    installed.clear()
    assert "-n" not in suite.command("card") and suite.missing() == "pytest, numpy not installed"
