"""An allocation that fails in one thread of the engine raises, and the next call is right.

The other threads wait for the one that failed, so without the engine's care they would wait for
ever. `failing_allocation.c` makes allocations fail in a process of its own.
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

pytestmark = [
    pytest.mark.skipif(
        fastclip.backends()["cpu"] != "available", reason="the C++ engine was not built"
    ),
    pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is Linux's"),
]

COMPILER = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
SECONDS = 30  # until a hanging process ends, with the places of its threads

SCRIPT = f"""
import ctypes, faulthandler, sys, threading
import torch
from fastclip import clip_loss

faulthandler.dump_traceback_later({SECONDS}, exit=True)
library = ctypes.CDLL(sys.argv[1])
generator = torch.Generator().manual_seed(0)
towers = torch.randn(2, 1500, 48, generator=generator).unbind()

def step():
    x, y = (t.clone().requires_grad_() for t in towers)
    value = clip_loss(x, y, 2.0, backend="cpu")
    value.backward()
    return value.detach(), x.grad, y.grad

expected = step()
def fail(others, found):
    # A new Python thread has new threads of the engine, each of which allocates once.
    torch.set_num_threads(3)
    library.fail_after(others)
    try:
        step()
        found.append("no error")
    except Exception as error:
        found.append(f"{{type(error).__name__}}: {{error}}")
    if library.is_pending():  # fewer threads took part
        found[-1] = "pending"
    library.fail_after(-1)
    found.append(all(map(torch.equal, expected, step())))

for turn in range(12):
    found = []
    thread = threading.Thread(target=fail, args=(turn % 3, found))
    thread.start()
    thread.join()
    print(turn % 3, *found, sep="; ")
"""


def test_it_raises_and_the_next_call_is_right(tmp_path: Path) -> None:
    if shutil.which(COMPILER[0]) is None:
        pytest.skip(f"no {COMPILER[0]}")
    library, source = tmp_path / "failing.so", Path(__file__).with_name("failing_allocation.c")
    command = [*COMPILER, "-O1", "-shared", "-fPIC", str(source), "-o", str(library), "-ldl"]
    subprocess.run(command, check=True)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(library)], capture_output=True, text=True, check=False,
        env={**os.environ, "LD_PRELOAD": str(library)}, timeout=SECONDS + 60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    turns = [line.split("; ") for line in done.stdout.splitlines()]
    assert len(turns) == 12
    for _, error, is_right in turns:
        assert is_right == "True" and error in ("MemoryError: std::bad_alloc", "pending"), turns
    failed = {others for others, error, _ in turns if error != "pending"}
    assert failed >= {"0", "1"}, "only one thread took part"
