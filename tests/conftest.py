"""Fixtures of all tests: the device, the engines that run on it, the judge, a seed.

- `device` is cpu unless FASTCLIP_TEST_DEVICE names another device.
- A test with `backend` runs once for each backend that is available on the device; a test with
  `engine` runs for each of them except the dense reference.
- `gpu_engine` is an engine for CUDA tensors. On CPUs these engines are interpreted or emulated, so
  they have smaller tests of their own.
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
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from support import dense_truth, judge

import fastclip
from fastclip.engine import torch_engine


def hasten_interpreter() -> None:
    """Lets Triton's interpreter search its language for builtins once.

    It searches at every call of a function from a kernel, and replaces those that it finds until
    the kernel ends. The search took a third of the time of this engine's tests.
    """
    from triton.language import core
    from triton.runtime import interpreter

    @functools.cache
    def builtins_of(package: Any) -> list[str]:
        members = inspect.getmembers(package)
        return [name for name, member in members if core.is_builtin(member)]

    def patch(package: Any, builder: object, scope: Any) -> None:
        for name in builtins_of(package):
            member = getattr(package, name)
            if core.is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch


def mend_interpreter() -> None:
    """Lets Triton's interpreter run loops with NumPy 2.4.

    Before 3.7 Triton represents a scalar as an array of shape (1,), which `int` no longer accepts.
    `item` accepts arrays of one element.
    """
    from triton.runtime import interpreter

    patch_language = interpreter._patch_lang_tensor

    def patch(tensor: type, scope: Any) -> None:
        patch_language(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    import triton

    hasten_interpreter()
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        mend_interpreter()

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
    monkeypatch.setattr(torch_engine, "CHUNK", 1 << 10)


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
