"""Fixtures of all tests: the device, the engines that run on it, the judge, a seed.

- `device` is cpu unless FASTCLIP_TEST_DEVICE names another device.
- A test with `backend` runs once for each backend that is available on the device; a test with
  `engine` runs for each of them except the dense reference.
- `gpu_engine` is an engine for CUDA tensors. On CPUs these engines are interpreted or emulated, so
  they have smaller tests of their own.
- `one` to `four` are pools of as many ranks.
- FASTCLIP_TEST_DEVICE=emulated replaces the C++ engine for CPU tensors by the emulated CUDA engine,
  which then runs all tests of losses and operators.
"""

import os

# Threads that spin while they wait take cores from threads that work: on a busy machine thousands
# of tiny parallel regions took ten times as long. The variable is read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Without a GPU, Triton's kernels run in its interpreter. The variable is read when Triton is first
# imported, which torch.compile does, too.
if os.environ.get("FASTCLIP_TEST_DEVICE", "cpu") in ("cpu", "emulated"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# After the standard distutils setuptools cannot be imported; Inductor would import it that late.
try:
    import setuptools
except ImportError:
    setuptools = None

import functools
import importlib.util
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from support import dense_truth, judge
from support.ranks import pools

import fastclip
from fastclip.engine import chunked_block

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    from support import interpreter

    interpreter.hasten()
    interpreter.mend()

TESTED = os.environ.get("FASTCLIP_TEST_DEVICE", "cpu")
DEVICE = torch.device("cpu" if TESTED == "emulated" else TESTED)
# The backends that compute on tensors of the tested device.
ON_DEVICE = {
    "cpu": ("cpu", "torch", "reference"), "emulated": ("cuda", "torch", "reference")
}.get(TESTED, ("cuda", "triton", "torch", "reference"))  # fmt: skip
if TESTED == "emulated":
    from support import cuda_case

    cuda_case.on_cpu_tensors(pytest.MonkeyPatch())
    # Products take fp16 weights in fp16, as on a GPU.
    dense_truth.assert_gradients = functools.partial(
        dense_truth.assert_gradients, half_products=True
    )

BACKENDS = [name for name in ON_DEVICE if fastclip.backends().get(name) == "available"]


def pytest_report_header() -> str:
    return f"fastclip: device {DEVICE}, backends {fastclip.backends()}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", BACKENDS)
    if "engine" in metafunc.fixturenames:
        metafunc.parametrize("engine", [name for name in BACKENDS if name != "reference"])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE


@pytest.fixture
def on_the_device(device: torch.device) -> Iterator[None]:
    """Makes new tensors on the device by default."""
    with device:
        yield


@pytest.fixture
def chunks_of_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the plain PyTorch engine cut small blocks, too, into several chunks."""
    monkeypatch.setattr(chunked_block, "CHUNK", 1 << 10)


@pytest.fixture(params=["triton", "cuda"])
def gpu_engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each fused engine for CUDA tensors; without a GPU these take CPU tensors."""
    from support.gpu_engine_case import prepare

    prepare(request.param, DEVICE, monkeypatch)
    return request.param


@pytest.fixture(scope="session")
def backends() -> list[str]:
    """The backends that are available on the device; the dense reference comes last."""
    return BACKENDS


@pytest.fixture(scope="session")
def assert_accurate() -> Callable[..., None]:
    return judge.assert_accurate


@pytest.fixture(scope="session")
def theirs() -> ModuleType:
    """The module `open_clip.loss`; skips the test if open_clip is not installed."""
    from support.open_clip_import import import_open_clip

    return import_open_clip().loss


def pool_fixture(name: str, world_size: int) -> Callable[[], pools.Ranks]:
    @pytest.fixture(name=name)
    def pool() -> pools.Ranks:
        return pools.pool_of(world_size)

    return pool


one, two = pool_fixture("one", 1), pool_fixture("two", 2)
three, four = pool_fixture("three", 3), pool_fixture("four", 4)


def pytest_sessionfinish() -> None:
    pools.close_all()
