"""No function of retrieval holds the matrix of scores, on any engine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

N = 4096
MATRIX = 4 * N * N  # bytes, in float32: 64 MiB

PROGRAM = """
import re, sys
import torch
from fastclip import retrieval

def high_water():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) << 10

def run(n):
    x, y = torch.randn(2, n, 8)
    for engine in ("cpu", "torch"):
        retrieval.ranks(x, y, backend=engine)
        retrieval.topk(x, y, 10, backend=engine)
        retrieval.sample_negatives(x, y, 5.0, backend=engine)

run(64)  # code and thread pools
before = high_water()
run(int(sys.argv[1]))
print(high_water() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' /proc")
def test_no_function_holds_the_matrix(tmp_path: Path) -> None:
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(N)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < MATRIX * 3 / 4  # plain PyTorch holds chunks of 36 MiB in all


FEATURES = """
import re, sys
import torch
from fastclip import retrieval

def high_water():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) << 10

x, y = torch.randn(2, 4096, 2048)
retrieval.metrics(x[:64], y[:64])
before = high_water()
retrieval.metrics(x, y, torch.tensor(100.0))
print(high_water() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' /proc")
def test_metrics_do_not_copy_the_features(tmp_path: Path) -> None:
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", FEATURES],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 24 << 20  # each side has 32 MiB
