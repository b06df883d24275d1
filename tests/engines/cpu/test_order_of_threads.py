"""The engine's threads update a tile one after another, and none waits for one that has failed.

Each test runs in a process of its own, which ends after SECONDS: a mistake in the waiting may hang.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import fastclip

pytestmark = pytest.mark.skipif(
    fastclip.backends()["cpu"] != "available", reason="the C++ engine was not built"
)

COMPILER = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
SECONDS = 30  # until a hanging process ends, with the places of its threads

STEP = f"""
import ctypes, faulthandler, sys, threading
import torch
from fastclip import clip_loss

faulthandler.dump_traceback_later({SECONDS}, exit=True)

def step(towers):
    x, y = (t.clone().requires_grad_() for t in towers)
    value = clip_loss(x, y, 2.0, backend="cpu")
    value.backward()
    return value.detach(), x.grad, y.grad
"""

# Features of two numbers leave the threads little to do but to wait for each other.
OVERTAKE = """
towers = torch.randn(2, 1000, 2).unbind()
torch.set_num_threads(1)
expected = step(towers)
torch.set_num_threads(3)
print(sum(all(map(torch.equal, expected, step(towers))) for _ in range(100)))
"""

FAIL = """
library = ctypes.CDLL(sys.argv[1])
towers = torch.randn(2, 1500, 48).unbind()
expected = step(towers)

def fail(others, found):
    # A new Python thread has new threads of the engine, each of which allocates once.
    torch.set_num_threads(3)
    library.fail_after(others)
    try:
        step(towers)
        found.append("no error")
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
    if library.is_pending():  # fewer threads took part
        found[-1] = "pending"
    library.fail_after(-1)
    found.append(all(map(torch.equal, expected, step(towers))))

for turn in range(12):
    found = []
    thread = threading.Thread(target=fail, args=(turn % 3, found))
    thread.start()
    thread.join()
    print(turn % 3, *found, sep="; ")
"""


def run(script: str, *arguments: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", STEP + script, *arguments], capture_output=True, text=True,
        env={**os.environ, **variables}, timeout=SECONDS + 60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_strip_overtakes_another() -> None:
    """All sums are then in the order of a single thread."""
    assert run(OVERTAKE) == "100\n"


@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is Linux's")
def test_a_failed_allocation_raises_and_the_next_call_is_right(tmp_path: Path) -> None:
    """In each thread in turn. `failing_allocation.cpp` makes them fail."""
    if shutil.which(COMPILER[0]) is None:
        pytest.skip(f"no {COMPILER[0]}")
    library, source = tmp_path / "failing.so", Path(__file__).with_name("failing_allocation.cpp")
    command = [*COMPILER, "-O1", "-shared", "-fPIC", str(source), "-o", str(library), "-ldl"]
    subprocess.run(command, check=True)
    said = run(FAIL, str(library), LD_PRELOAD=str(library))
    turns = [line.split("; ") for line in said.splitlines()]
    assert len(turns) == 12
    for _, error, is_right in turns:
        assert is_right == "True" and error in ("MemoryError: std::bad_alloc", "pending"), turns
    failed = {others for others, error, _ in turns if error != "pending"}
    assert failed >= {"0", "1"}, "only one thread took part"
