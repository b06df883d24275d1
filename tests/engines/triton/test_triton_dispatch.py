"""The Triton engine is chosen on cards that can run it; otherwise the reason is reported.

Nothing imports it before it is needed.
"""

import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from support.pretended_card import CPU, CUDA, backends, nothing_known, pretend
from support.triton_case import needs_engine, needs_triton

from fastclip.loss import clip_loss


def choose(asked: str | None, device: torch.device, dtype: torch.dtype) -> str:
    return backends.choose(asked, device, dtype, 1000, 512)


@pytest.fixture
def fresh() -> Iterator[pytest.MonkeyPatch]:
    with nothing_known() as patch:
        yield patch


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1", "3.10.0", "4.0.0+git1234"])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
def test_it_is_the_default_on_cards(
    fresh: pytest.MonkeyPatch, capability: tuple[int, int], version: str
) -> None:
    pretend(fresh, capability, version)
    assert backends.backends()["triton"] == "available"
    assert choose(None, CUDA, torch.bfloat16) == "triton"
    assert choose("triton", CUDA, torch.float32) == "triton"


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
    assert reason in backends.backends()["triton"]
    with pytest.warns(UserWarning, match=f"plain PyTorch engine on cuda tensors: .*{reason}"):
        assert choose(None, CUDA, torch.float32) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(None, CUDA, torch.float32) == "torch"
    with pytest.raises(ValueError, match=f"'triton' cannot run here.*{reason}"):
        choose("triton", CUDA, torch.float32)


@pytest.mark.parametrize("asked", [None, "triton"])
def test_float64_takes_the_plain_engine_silently(
    fresh: pytest.MonkeyPatch, asked: str | None
) -> None:
    pretend(fresh, (9, 0), "3.7.1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(asked, CUDA, torch.float64) == "torch"


def test_a_missing_card_is_reported(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(torch.cuda, "is_available", lambda: False)
    assert backends.backends()["triton"] == "no CUDA device is available"
    with pytest.raises(ValueError, match="no CUDA device is available"):
        choose("triton", CPU, torch.float32)


def test_cpu_tensors_are_refused_outside_the_interpreter(fresh: pytest.MonkeyPatch) -> None:
    pretend(fresh, (9, 0), "3.7.1")
    with pytest.raises(ValueError, match="takes CUDA tensors, got tensors on cpu"):
        choose("triton", CPU, torch.float32)


@needs_engine
def test_the_interpreter_is_never_the_default() -> None:
    assert choose(None, CPU, torch.float32) != "triton"
    assert choose("triton", CPU, torch.float32) == "triton"
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
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_driver_that_does_not_start_is_reported(fresh: pytest.MonkeyPatch) -> None:
    """Triton compiles its driver with the system's C compiler, on first use."""

    def starts() -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    pretend(fresh, (9, 0), "3.7.1", starts)
    reason = "Triton's driver does not start: Failed to find C compiler."
    assert backends.backends()["triton"] == reason
    with pytest.warns(UserWarning, match="Failed to find C compiler"):
        assert choose(None, CUDA, torch.bfloat16) == "torch"
