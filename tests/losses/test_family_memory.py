"""No engine allocates a matrix for a loss of the family."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from conftest import DEVICE
from support.family import CASES, Case, call, of_batch, tensors
from support.judge import PRECISIONS
from torch.profiler import ProfilerActivity, profile

from fastclip import loss
from fastclip.engine import chunked_block
from fastclip.formulas import nt_xent

N = 2048
MATRIX = 4 * N * N  # bytes, in float32: 16 MiB
MEMORY = [
    "both ways", "hardness", "false negatives", "positives by id", "supcon", "nt_xent", "ranking",
    "hardest", "distill", "siglip, positives",
]  # fmt: skip


def allocated(case: Case, device: torch.device, backend: str) -> tuple[int, int]:
    """Returns bytes: the largest allocation of a step, and the most held at a time."""
    t = tensors(case, of_batch(case, "random", N, 6, 3.0), PRECISIONS["float32"], device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        value = call(case, loss, t, backend=backend, memory_budget=0)
        value.backward()
    events = run.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(sizes), max(itertools.accumulate(sizes))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(chunked_block, "CHUNK", 1 << 16)
    monkeypatch.setattr(nt_xent, "HALVED", range(512, 4097))
    yield


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the profiler's events are read for the CPU only")
@pytest.mark.parametrize("name", MEMORY)
@pytest.mark.usefixtures("small_chunks")
def test_no_engine_allocates_a_matrix(name: str, engine: str, device: torch.device) -> None:
    largest, most = allocated(CASES[name], device, engine)
    assert largest < MATRIX / 4
    assert most < MATRIX / 2


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the profiler's events are read for the CPU only")
def test_the_profiler_catches_the_dense_twin(device: torch.device) -> None:
    largest, _ = allocated(CASES["both ways"], device, "reference")
    assert largest >= MATRIX
