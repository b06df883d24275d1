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

from .. import triton_kernels
from ..kinds import KINDS
from . import operators, preference, torch_engine

AVAILABLE = "available"

# Of a CUDA card, for a fused engine: bf16 on tensor cores.
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

    "cpu" is the C++ engine, "cuda" the C++ engine for CUDA tensors, "triton" the Triton engine for
    them, "torch" the plain PyTorch engine for any device, "reference" the dense loss that engines
    are compared with.
    """
    return {
        "cpu": _CPU_STATUS,
        "cuda": _status("cuda", None),
        "triton": _status("triton", None),
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


@functools.cache
def _capability(device: int | None) -> tuple[int, int] | None:
    """Of a CUDA device, where there is one."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


def _card_problem(device: int | None) -> str | None:
    capability = _capability(device)
    if capability is None:
        return "no CUDA device is available"
    if capability < LEAST_CAPABILITY:
        return "it needs a CUDA device of capability {}.{} or more, got {}.{}".format(
            *LEAST_CAPABILITY, *capability
        )
    return None


def _find_cuda(device: int | None) -> str:
    if _MODULE is None:
        return _CPU_STATUS
    info = _MODULE.build_info()
    if not info["cuda"]:
        reason = info.get("why_no_cuda", "by an earlier version of fastclip")
        return f"fastclip was built without it: {reason}"
    if problem := _card_problem(device):
        return problem
    compiled, capability = info["cuda"]["architectures"], _capability(device)
    if not any(_runs_on(code, capability) for code in compiled):
        card = ".".join(map(str, capability))
        return (
            f"it was compiled for {', '.join(compiled)}, none of which runs on a device of "
            f"capability {card}: install fastclip again with TORCH_CUDA_ARCH_LIST={card}"
        )
    return AVAILABLE


def _runs_on(code: str, capability: tuple[int, int]) -> bool:
    """sm_86 is code for cards of 8.6 to 8.9, compute_86 PTX for all from 8.6 on; with an "a" both
    are for 8.6 alone, with an "f" for 8.6 to 8.9."""
    kind, number, suffix = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", code).groups()
    of = (int(number[:-1]), int(number[-1]))
    if suffix == "a":
        return of == capability
    return of <= capability and (of[0] == capability[0] or (kind == "compute" and not suffix))


def _find_triton(device: int | None) -> str:
    if not interpreted() and (problem := _card_problem(device)):
        return problem
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


_FINDERS = {"cuda": _find_cuda, "triton": _find_triton}
_STATUS: dict[tuple[str, int | None], str] = {}


def _status(engine: str, device: int | None) -> str:
    """For a CUDA device; None asks for the current one. Looks at Triton only where it can run."""
    if (engine, device) not in _STATUS:
        _STATUS[engine, device] = _FINDERS[engine](device)
    return _STATUS[engine, device]


def _rows(device: int | None, dtype: torch.dtype) -> list[preference.Row]:
    """Those of the table that hold for a card and the products of this dtype."""
    products, capability = preference.products_of(dtype), _capability(device) or (0, 0)
    return [row for row in preference.TABLE if row.takes(products, capability)]


def _asked() -> str | None:
    """What FASTCLIP_GPU asks for."""
    name, known = os.environ.get("FASTCLIP_GPU") or None, (*_FINDERS, "torch")
    if name is not None and name not in known:
        raise ValueError(f"FASTCLIP_GPU must be one of {', '.join(map(repr, known))}, got {name!r}")
    return name


def _has_kind(engine: str, kind: str) -> bool:
    """An engine has the kind's functions; one that is not available has none."""
    if engine in ("torch", "reference"):
        return kind in KINDS
    if engine == "triton":
        if _status(engine, None) != AVAILABLE:
            return False
        return kind in importlib.import_module("fastclip.triton_kernels.epilogues").EPILOGUES
    return kind in _COMPILED_KINDS


# What torch.compiler.assume_constant_result does, without importing the compiler here: a compiled
# loss asks once, when it is compiled.
for _function in (_status, _rows, _asked, _has_kind):
    _function._dynamo_marked_constant = True  # type: ignore[attr-defined]

# The types of device whose tensors an engine takes; those that are not here take any.
_SERVED = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda",)}


def _serves(backend: str, device: torch.device) -> bool:
    if backend == "triton" and device.type == "cpu" and interpreted():
        return True
    return device.type in _SERVED.get(backend, (device.type,))


def _state(backend: str, device: torch.device) -> str | None:
    """ "available", the reason why not, or None for a name that is no backend's."""
    if backend in _FINDERS:
        return _status(backend, device.index if device.type == "cuda" else None)
    return {"cpu": _CPU_STATUS, "torch": AVAILABLE, "reference": AVAILABLE}.get(backend)


def _default(device: torch.device, dtype: torch.dtype, logits: int, d: int, kind: str) -> str:
    if device.type == "cpu":
        reason = _CPU_STATUS
        if reason == AVAILABLE:
            return "cpu" if _has_kind("cpu", kind) else "torch"
    elif device.type == "cuda":
        if dtype == torch.float64:
            return "torch"
        engines = preference.order(_rows(device.index, dtype), logits, d)
        for engine in engines:
            if _status(engine, device.index) == AVAILABLE:
                return engine if _has_kind(engine, kind) else "torch"
        reason = "; ".join(f"{engine}: {_status(engine, device.index)}" for engine in engines)
    elif device.type == "meta":
        return "torch"
    else:
        reason = f"there is no fused engine for {device.type} yet"
    if not torch.compiler.is_compiling():
        _warn_of_fallback(device.type, reason)
    return "torch"


def choose(
    backend: str | None, device: torch.device, dtype: torch.dtype, logits: int, d: int,
    kind: str = "softmax",
) -> str:  # fmt: skip
    """The engine for so many logits of d features, the dtype of their products, and a kind of
    statistic. None takes the one that `preference.py` puts first of those that can run; falling
    back to plain PyTorch warns once, unless the kind is a user's own. float64 on GPUs is always the
    plain engine's.

    Raises:
        ValueError: unknown or unavailable, or one that does not serve this device or kind.
    """
    if backend is None and device.type == "cuda":
        backend = _asked()
    if backend is None:
        return _default(device, dtype, logits, d, kind)
    # Of this one alone: asking for all of them would start CUDA where nobody wants it, and fail in
    # a process that was forked from one that uses it.
    state = _state(backend, device)
    if state == AVAILABLE and _serves(backend, device) and not _has_kind(backend, kind):
        raise ValueError(
            f"kind {kind!r} must be one that backend {backend!r} has; plain PyTorch has all: "
            f"backend=None or 'torch', got {backend!r}"
        )
    if state == AVAILABLE and _serves(backend, device):
        return "torch" if backend in _FINDERS and dtype == torch.float64 else backend
    status = backends()
    available = ", ".join(repr(name) for name, reason in status.items() if reason == AVAILABLE)
    if backend not in status:
        rule = f"backend must be None or one of {', '.join(map(repr, status))}"
    elif state != AVAILABLE:
        rule = f"backend {backend!r} cannot run here ({state})"
    else:
        kind = {"cpu": "CPU", "cuda": "CUDA"}[_SERVED[backend][0]]
        rule = f"backend {backend!r} takes {kind} tensors, got tensors on {device}"
    raise ValueError(f"{rule}; available: {available}; got {backend!r}")


operators.implement("torch", torch_engine)
operators.implement("triton", triton_kernels)
_MODULE, _CPU_STATUS = _load_extension()
_COMPILED_KINDS = frozenset(() if _MODULE is None else _MODULE.build_info()["kinds"])
