"""Large buffers of the C++ engine are cached for the next step, can be freed, and have one owner.

They hold kept products, and gradients of a MiB and more. Other engines cache no buffers.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.losses import LOSSES
from torch import Tensor

import fastclip
from fastclip.engine import operators
from fastclip.engine.block import Block, Side
from fastclip.loss import clip_loss

MIB = 1 << 20

pytestmark = pytest.mark.skipif(
    fastclip.backends()["cpu"] != "available", reason="the C++ engine was not built"
)

STEPS = """
import json, re
import torch
import fastclip
from fastclip.loss import clip_loss

def memory(name):
    return int(re.search(name + r":\\s*(\\d+) kB", open("/proc/self/status").read())[1]) << 10

def step(n):
    x, y = (torch.randn(n, 8, requires_grad=True) for _ in range(2))
    clip_loss(x, y, 2.0, backend="cpu").backward()

def resident():
    return memory("VmRSS")

step(256)  # code and work space of threads: too small for the buffer
report = {"before": resident()}
step(4096)
report |= {"after": resident(), "high": memory("VmHWM")}
for _ in range(3):
    step(4096)
report |= {"again": resident(), "high again": memory("VmHWM")}
fastclip.release_workspace()
report |= {"released": resident()}
fastclip.release_workspace()  # of nothing
step(4096)
report |= {"afterwards": resident()}
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report() -> dict[str, int]:
    """Returns a process's memory in bytes after its steps. The buffer of 4,096 pairs is 64 MiB."""
    if not Path("/proc/self/status").exists():
        pytest.skip("reads Linux' /proc")
    done = subprocess.run(
        [sys.executable, "-c", STEPS],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


BUFFER = 4 * 4096 * 4096


def test_the_buffer_is_cached_for_the_next_step(report: dict[str, int]) -> None:
    assert report["after"] - report["before"] > 0.9 * BUFFER
    assert report["again"] - report["after"] < 4 * MIB
    assert report["high again"] - report["high"] < 4 * MIB, "the second step took a second buffer"


def test_the_buffer_can_be_freed(report: dict[str, int]) -> None:
    assert report["again"] - report["released"] > 0.9 * BUFFER
    assert report["released"] - report["before"] < 8 * MIB
    assert report["afterwards"] - report["released"] > 0.9 * BUFFER


def features(n: int, seed: int = 0, spoilt: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, n, 16, generator=generator).unbind()
    if spoilt:
        x = x * torch.nan
    return [x.requires_grad_(), y.requires_grad_()]


def step(loss: str, n: int, **options: object) -> list[Tensor]:
    x, y = features(n, **options)
    value = LOSSES[loss](x, y, 1.5, -1.0, reduction="none", backend="cpu")
    value.sum().backward()
    return [value.detach(), x.grad, y.grad]


def assert_equal(results: list[Tensor], others: list[Tensor]) -> None:
    for one, other in zip(results, others, strict=True):
        assert torch.equal(one, other)


# From about 512 pairs on, products lie in a cached buffer. It serves sizes down to half its own.
SIZES = (900, 700, 640, 899, 520, 1000, 30, 901)


@pytest.mark.parametrize("loss", LOSSES)
def test_old_contents_of_the_buffer_do_not_affect_results(loss: str) -> None:
    """Smaller and larger batches follow one another, and each follows a batch of NaN."""
    expected = {}
    for n in SIZES:
        fastclip.release_workspace()
        expected[n] = step(loss, n)
    for n in SIZES:
        assert_equal(step(loss, n), expected[n])
    for n in SIZES:
        assert step(loss, n + 20, spoilt=True)[0].isnan().all()
        assert_equal(step(loss, n), expected[n])


@pytest.mark.parametrize("loss", LOSSES)
def test_steps_that_wait_for_their_backward_have_a_buffer_each(loss: str) -> None:
    """All forwards run first; backwards run later, in any order and more than once."""
    sizes = (700, 690, 710)
    expected = [step(loss, n, seed=n) for n in sizes]
    inputs = [features(n, seed=n) for n in sizes]
    values = [LOSSES[loss](*xy, 1.5, -1.0, reduction="none", backend="cpu") for xy in inputs]
    fastclip.release_workspace()  # does not free buffers in use
    for turn in range(2):
        for which in (1, 2, 0):
            x, y = inputs[which]
            values[which].sum().backward(retain_graph=turn == 0)
            assert_equal([values[which].detach(), x.grad, y.grad], expected[which])
            x.grad = y.grad = None


def test_a_buffer_is_reused_only_after_its_owner_is_gone() -> None:
    """A loss that is dropped without a backward returns its buffer to the cache."""
    fastclip.release_workspace()
    x, y = (t.detach() for t in features(600))
    block = Block(Side(x), Side(y), torch.tensor(1.5, dtype=torch.float64))

    def kept() -> Tensor:
        return operators.sweep("cpu", block, keep=608).kept

    def address() -> int:
        return kept().data_ptr()

    first = address()
    assert address() == first
    held = kept()
    assert held.data_ptr() == first
    assert address() != first


def gradients(seed: int) -> list[Tensor]:
    """Returns the gradients of 1,000 pairs of 512 features, 2 MiB each."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(1000, 512, generator=generator).requires_grad_() for _ in range(2))
    clip_loss(x, y, 1.5, normalize=True, backend="cpu").backward()
    return [x.grad, y.grad]


def test_a_gradient_that_is_held_is_not_overwritten() -> None:
    held = gradients(0)
    copies = [g.clone() for g in held]
    others = gradients(1)
    assert_equal(held, copies)
    assert not {g.data_ptr() for g in held} & {g.data_ptr() for g in others}
    assert_equal(gradients(0), copies)


def test_the_memory_of_a_freed_gradient_serves_the_next_step() -> None:
    fastclip.release_workspace()
    places = {g.data_ptr() for g in gradients(0)}
    assert {g.data_ptr() for g in gradients(1)} == places


def test_a_gradients_storage_is_like_any_other() -> None:
    """It can be resized, shared between processes, and saved."""
    x_grad, y_grad = gradients(0)
    expected = x_grad.clone()
    x_grad.resize_(3000, 512)
    assert torch.equal(x_grad[:1000], expected)
    expected = y_grad.clone()
    assert torch.equal(y_grad.share_memory_(), expected)
    assert torch.equal(gradients(0)[1], expected)
