"""Which engines can run here, and why each other one cannot."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import warnings
from pathlib import Path
from types import ModuleType

import torch

from . import chunked, ops, triton_kernels

AVAILABLE = "available"

# Of a CUDA card, for the Triton engine: bf16 on tensor cores.
LEAST_CAPABILITY = (8, 0)


def _load_extension() -> tuple[ModuleType | None, str]:
    """The compiled module, whose import registers its operators; or None and the reason."""
    try:
        module = importlib.import_module("fastclip._C")
        built = str(module.build_info()["torch"])
        # It uses C++ internals of torch: that it loads beside another release proves nothing.
        if built.partition("+")[0] != torch.__version__.partition("+")[0]:
            raise ImportError("its torch is another release")
        return module, AVAILABLE
    except ImportError as error:
        spec = importlib.util.find_spec("fastclip._C")
        if spec is None or spec.origin is None:
            return None, (
                "the compiled module fastclip._C was not built (install fastclip with torch and a "
                "C++20 compiler at hand, and --no-build-isolation; pip -v shows what failed)"
            )
        found = re.search(rb"fastclip built against torch ([^\0]+)", Path(spec.origin).read_bytes())
        built = found[1].decode() if found else "an unknown version"
        return None, (
            f"the compiled module was built against torch {built} and does not load with torch "
            f"{torch.__version__}: {str(error).splitlines()[0]}; install fastclip again"
        )


def build_info() -> dict[str, object] | None:
    """Compiler, torch built against, instruction sets, product, threads; None if not compiled."""
    return None if _MODULE is None else _MODULE.build_info()


def release_workspace() -> None:
    """Frees the buffers that wait for the next step, on CPUs.

    Products kept for a backward and gradients of a MiB and more, once freed: at most 512 MiB, and
    whatever `memory_budget` is now.
    """
    if _MODULE is not None:
        _MODULE.release_workspace()


def backends() -> dict[str, str]:
    """Every engine's name, with "available" or the reason why it cannot run here.

    "cpu" is the C++ engine, "triton" the fused engine for CUDA tensors, "torch" the plain PyTorch
    engine for any device, "reference" the dense loss that engines are compared with. "cuda" is not
    part of this version.
    """
    return {
        "cpu": _CPU_STATUS,
        "cuda": "not part of this version of fastclip",
        "triton": _triton_status(None),
        "torch": AVAILABLE,
        "reference": AVAILABLE,
    }


@functools.cache
def _warn_of_fallback(device: str, reason: str) -> None:
    warnings.warn(
        f"fastclip runs its plain PyTorch engine on {device} tensors: {reason}", stacklevel=2
    )


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors: for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


_TRITON_STATUS: dict[int | None, str] = {}


def _triton_status(device: int | None) -> str:
    """For a CUDA device; None asks for the current one. Looks at Triton only where it can run."""
    if device not in _TRITON_STATUS:
        _TRITON_STATUS[device] = _find_triton(device)
    return _TRITON_STATUS[device]


# What torch.compiler.assume_constant_result does, without importing the compiler here.
_triton_status._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _find_triton(device: int | None) -> str:
    if not interpreted():
        if not torch.cuda.is_available():
            return "no CUDA device is available"
        capability = torch.cuda.get_device_capability(device)
        if capability < LEAST_CAPABILITY:
            return "it needs a CUDA device of capability {}.{} or more, got {}.{}".format(
                *LEAST_CAPABILITY, *capability
            )
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported: {str(error).splitlines()[0]}"
    oldest = triton_kernels.OLDEST_TRITON
    found = re.match(r"(\d+)\.(\d+)", triton.__version__)
    if found is None or tuple(map(int, found.groups())) < oldest:
        return f"it needs Triton {oldest[0]}.{oldest[1]} or later, got {triton.__version__}"
    if not interpreted():
        try:  # its driver is compiled on first use: no C compiler, no kernels
            triton.runtime.driver.active.get_current_target()
        except Exception as error:
            return f"Triton's driver does not start: {(str(error) or repr(error)).splitlines()[0]}"
    return AVAILABLE


def _serves(backend: str, device: torch.device) -> str:
    """The devices that a backend takes, if this is none of them."""
    if backend == "cpu" and device.type != "cpu":
        return "CPU tensors"
    if (
        backend == "triton"
        and device.type != "cuda"
        and not (device.type == "cpu" and interpreted())
    ):
        return "CUDA tensors"
    return ""


def choose(backend: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The engine for a device and the dtype of the products. None takes the fastest that can run;
    falling back warns once. float64 on GPUs is always the plain PyTorch engine's.

    Raises:
        ValueError: unknown or unavailable, or one that does not serve this device.
    """
    if backend is None:
        if device.type == "cpu":
            reason = _CPU_STATUS
            if reason == AVAILABLE:
                return "cpu"
        elif device.type == "cuda":
            if dtype == torch.float64:
                return "torch"
            reason = _triton_status(device.index)
            if reason == AVAILABLE:
                return "triton"
        else:
            reason = f"there is no fused engine for {device.type} yet"
        if not torch.compiler.is_compiling():
            _warn_of_fallback(device.type, reason)
        return "torch"
    status = backends()
    if backend == "triton" and device.type == "cuda":
        status["triton"] = _triton_status(device.index)
    if status.get(backend) == AVAILABLE and not _serves(backend, device):
        return "torch" if backend == "triton" and dtype == torch.float64 else backend
    available = ", ".join(repr(name) for name, reason in status.items() if reason == AVAILABLE)
    if backend not in status:
        rule = f"backend must be None or one of {', '.join(map(repr, status))}"
    elif status[backend] != AVAILABLE:
        rule = f"backend {backend!r} cannot run here ({status[backend]})"
    else:
        rule = f"backend {backend!r} takes {_serves(backend, device)}, got tensors on {device}"
    raise ValueError(f"{rule}; available: {available}; got {backend!r}")


ops.implement("torch", chunked)
ops.implement("triton", triton_kernels)
_MODULE, _CPU_STATUS = _load_extension()
