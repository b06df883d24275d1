"""Which engines can run here, and why each other one cannot."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import warnings
from pathlib import Path
from types import ModuleType

import torch

from . import chunked, ops

AVAILABLE = "available"


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

    At most one step's: its memory_budget, and gradients that have been freed.
    """
    if _MODULE is not None:
        _MODULE.release_workspace()


def backends() -> dict[str, str]:
    """Every engine's name, with "available" or the reason why it cannot run here.

    "cpu" is the C++ engine, "torch" the plain PyTorch engine for any device, "reference" the dense
    loss that engines are compared with. "cuda" and "triton" are not part of this version.
    """
    absent = "not part of this version of fastclip"
    return {
        "cpu": _CPU_STATUS,
        "cuda": absent,
        "triton": absent,
        "torch": AVAILABLE,
        "reference": AVAILABLE,
    }


@functools.cache
def _warn_of_fallback(device: str, reason: str) -> None:
    warnings.warn(
        f"fastclip runs its plain PyTorch engine on {device} tensors: {reason}", stacklevel=2
    )


def choose(backend: str | None, device: torch.device) -> str:
    """The engine for a device. None takes the fastest that can run; falling back warns once.

    Raises:
        ValueError: unknown or unavailable, or one that does not serve this device.
    """
    if backend is None:
        if device.type == "cpu":
            reason = _CPU_STATUS
            if reason == AVAILABLE:
                return "cpu"
        else:
            reason = f"there is no fused engine for {device.type} yet"
        if not torch.compiler.is_compiling():
            _warn_of_fallback(device.type, reason)
        return "torch"
    status = backends()
    if status.get(backend) == AVAILABLE and (backend != "cpu" or device.type == "cpu"):
        return backend
    available = ", ".join(repr(name) for name, reason in status.items() if reason == AVAILABLE)
    if backend not in status:
        rule = f"backend must be None or one of {', '.join(map(repr, status))}"
    elif status[backend] != AVAILABLE:
        rule = f"backend {backend!r} cannot run here ({status[backend]})"
    else:
        rule = f"backend {backend!r} takes CPU tensors, got tensors on {device}"
    raise ValueError(f"{rule}; available: {available}; got {backend!r}")


ops.implement("torch", chunked)
_MODULE, _CPU_STATUS = _load_extension()
