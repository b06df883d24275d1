"""What every test may ask for: the device, the engines that can run on it, the judge, a seed.

`device` is cpu unless FASTCLIP_TEST_DEVICE says otherwise. The engines for CUDA tensors, which are
interpreted and emulated there, have tests of their own, smaller ones, that take `gpu_engine`. A
test that takes `backend` runs once for each backend that is available there, one that takes
`engine` for each but the dense reference. FASTCLIP_TEST_DEVICE=emulated puts the CUDA engine,
emulated, in the place of the C++ one for CPU tensors: all tests of losses and operators are its.
"""

import os

# Threads that wait by spinning take the cores from those that work: where other processes keep a
# machine busy, thousands of tiny parallel regions took ten times as long. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Without a card Triton's kernels run in its interpreter. Read when Triton is first imported, which
# torch.compile does, too, for its own ends.
if os.environ.get("FASTCLIP_TEST_DEVICE", "cpu") in ("cpu", "emulated"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

try:  # before the standard distutils: inductor imports it late, and then it refuses
    import setuptools
except ImportError:
    setuptools = None

import functools
import importlib.util
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from support import dense_truth, judge

import fastclip
from fastclip.engine import torch_engine


def mend_interpreter() -> None:
    """Before 3.7 Triton interprets a scalar as an array of shape (1,), of which NumPy 2.4 makes no
    `int` any more: no kernel with a loop would run. `item` takes arrays of one element."""
    from triton.runtime import interpreter

    patch_language = interpreter._patch_lang_tensor

    def patch(tensor: type, scope: Any) -> None:
        patch_language(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        mend_interpreter()

TESTED = os.environ.get("FASTCLIP_TEST_DEVICE", "cpu")
DEVICE = torch.device("cpu" if TESTED == "emulated" else TESTED)
# Which backends compute on tensors of which kind of device.
ON_DEVICE = {
    "cpu": ("cpu", "torch", "reference"), "emulated": ("cuda", "torch", "reference")
}.get(TESTED, ("cuda", "triton", "torch", "reference"))  # fmt: skip
if TESTED == "emulated":
    from support import cuda_case

    cuda_case.on_cpu_tensors(pytest.MonkeyPatch())
    # Weights in fp16, as on a card.
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
    """New tensors are made there."""
    with device:
        yield


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain PyTorch engine cuts small blocks, too, several times."""
    monkeypatch.setattr(torch_engine, "CHUNK", 1 << 10)


@pytest.fixture(params=["triton", "cuda"])
def gpu_engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Either fused engine for CUDA tensors; without a card they take CPU tensors."""
    from support.gpu_engine_case import prepare

    prepare(request.param, DEVICE, monkeypatch)
    return request.param


@pytest.fixture(scope="session")
def backends() -> list[str]:
    """The backends that are available on the device, the dense reference last."""
    return BACKENDS


@pytest.fixture(scope="session")
def assert_accurate() -> Callable[..., None]:
    return judge.assert_accurate


@pytest.fixture(scope="session")
def theirs() -> ModuleType:
    """`open_clip.loss`; skips where open_clip is missing."""
    from support.open_clip_import import import_open_clip

    return import_open_clip().loss
