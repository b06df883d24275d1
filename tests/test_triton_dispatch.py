"""When the Triton engine is taken, when it is not and why, and that nothing asks for it early."""

import importlib
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from triton_case import needs_engine, needs_triton

from fastclip.loss import clip_loss, siglip_loss

module = importlib.import_module("fastclip.backends")  # beside it fastclip.backends is a function
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Nothing found out before, and no interpreter."""
    monkeypatch.setattr(module, "_TRITON_STATUS", {})
    monkeypatch.setattr(module, "interpreted", lambda: False)
    module._warn_of_fallback.cache_clear()
    yield monkeypatch
    module._warn_of_fallback.cache_clear()


def pretend(
    patch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    version: str | None,
    starts: Callable[[], object] = object,
) -> None:
    """A card and a Triton that are not here."""
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    target = types.SimpleNamespace(get_current_target=starts)
    runtime = types.SimpleNamespace(driver=types.SimpleNamespace(active=target))
    triton = types.SimpleNamespace(__version__=version, runtime=runtime) if version else None
    patch.setitem(sys.modules, "triton", triton)


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1", "3.10.0", "4.0.0+git1234"])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
def test_it_is_the_default_on_cards(
    fresh: pytest.MonkeyPatch, capability: tuple[int, int], version: str
) -> None:
    pretend(fresh, capability, version)
    assert module.backends()["triton"] == "available"
    assert module.choose(None, CUDA, torch.bfloat16) == "triton"
    assert module.choose("triton", CUDA, torch.float32) == "triton"


@pytest.mark.parametrize(
    "capability, version, reason",
    [
        ((9, 0), None, "Triton cannot be imported"),
        ((9, 0), "3.5.1", "it needs Triton 3.6 or later, got 3.5.1"),
        ((9, 0), "2.1.0", "it needs Triton 3.6 or later, got 2.1.0"),
        ((9, 0), "unknown", "it needs Triton 3.6 or later, got unknown"),
        ((7, 5), "3.7.1", "capability 8.0 or more, got 7.5"),
    ],
)
def test_it_falls_back_with_one_warning(
    fresh: pytest.MonkeyPatch, capability: tuple[int, int], version: str | None, reason: str
) -> None:
    pretend(fresh, capability, version)
    assert reason in module.backends()["triton"]
    with pytest.warns(UserWarning, match=f"plain PyTorch engine on cuda tensors: .*{reason}"):
        assert module.choose(None, CUDA, torch.float32) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert module.choose(None, CUDA, torch.float32) == "torch"
    with pytest.raises(ValueError, match=f"'triton' cannot run here.*{reason}"):
        module.choose("triton", CUDA, torch.float32)


@pytest.mark.parametrize("asked", [None, "triton"])
def test_float64_takes_the_plain_engine_silently(
    fresh: pytest.MonkeyPatch, asked: str | None
) -> None:
    pretend(fresh, (9, 0), "3.7.1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert module.choose(asked, CUDA, torch.float64) == "torch"


def test_without_a_card_it_says_so(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(torch.cuda, "is_available", lambda: False)
    assert module.backends()["triton"] == "no CUDA device is available"
    with pytest.raises(ValueError, match="no CUDA device is available"):
        module.choose("triton", CPU, torch.float32)


def test_cpu_tensors_are_refused_outside_the_interpreter(fresh: pytest.MonkeyPatch) -> None:
    pretend(fresh, (9, 0), "3.7.1")
    with pytest.raises(ValueError, match="takes CUDA tensors, got tensors on cpu"):
        module.choose("triton", CPU, torch.float32)


@needs_engine
def test_the_interpreter_is_never_the_default() -> None:
    assert module.choose(None, CPU, torch.float32) != "triton"
    assert module.choose("triton", CPU, torch.float32) == "triton"
    x = torch.randn(5, 4, dtype=torch.float64)
    loss = clip_loss(x, x, 2.0, backend="triton")
    assert loss.dtype == torch.float64 and loss == clip_loss(x, x, 2.0, backend="torch")


@needs_triton
def test_importing_fastclip_imports_neither_triton_nor_its_kernels() -> None:
    code = (
        "import sys, torch, fastclip, fastclip.loss, fastclip.triton_kernels\n"
        "x = torch.randn(4, 3)\n"
        "fastclip.clip_loss(x, x, 2.0)\n"
        "assert not torch.cuda.is_initialized()\n"
        "print([name for name in sys.modules if name == 'triton' or name.startswith("
        "'fastclip.triton_kernels.')])\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@needs_engine
@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
def test_it_is_an_operator_to_the_compiler(loss: object) -> None:
    """One graph, no break, and the same gradients."""

    def step(x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return loss(x, y, scale, -1.0, backend="triton", memory_budget=0)

    results = []
    for f in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        x, y = torch.randn(2, 33, 8, generator=torch.Generator().manual_seed(0)).unbind()
        inputs = [t.clone().requires_grad_() for t in (x, y, torch.tensor(9.0))]
        value = f(*inputs)
        value.backward()
        results.append([value.detach(), *(t.grad for t in inputs)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@needs_engine
def test_operators_agree_with_their_fakes() -> None:
    x, y = torch.randn(2, 33, 8, generator=torch.Generator().manual_seed(0)).unbind()
    scale, bias = torch.tensor(9.0), torch.tensor(-1.0)
    gain = torch.ones((), dtype=torch.float64)
    operators = torch.ops.fastclip
    block = (x, y, None, None, scale, bias)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        operators.sweep.triton, (*block, None, 0, "softmax", 16), test_utils=tests
    )
    torch.library.opcheck(
        operators.sweep_and_weigh.triton, (*block, gain, 0, "sigmoid", True, False, False),
        test_utils=tests,
    )  # fmt: skip
    state, positive, kept = operators.sweep.triton(*block, None, 0, "softmax", 16)
    torch.library.opcheck(
        operators.weigh.triton,
        (*block, state, positive, state[1].reciprocal(), positive, gain, kept, 0, "softmax", True,
         True, False, torch.float32, torch.bfloat16),
        test_utils=tests,
    )  # fmt: skip


def test_a_driver_that_does_not_start_is_told(fresh: pytest.MonkeyPatch) -> None:
    """Triton compiles it with the system's C compiler, on first use."""

    def starts() -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    pretend(fresh, (9, 0), "3.7.1", starts)
    reason = "Triton's driver does not start: Failed to find C compiler."
    assert module.backends()["triton"] == reason
    with pytest.warns(UserWarning, match="Failed to find C compiler"):
        assert module.choose(None, CUDA, torch.bfloat16) == "torch"
