"""Which engines can run here, why each of the others cannot, and which one is the default."""

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
from .arithmetic import arithmetic_of
from .compile_marks import constant_in_graphs
from .namespace import PACKAGE

AVAILABLE = "available"

# The least capability of a CUDA card for a fused engine: bf16 on tensor cores.
LEAST_CAPABILITY = (8, 0)


def _load_extension() -> tuple[ModuleType | None, str]:
    """Imports the compiled module, which registers its operators; returns it, and availability."""
    name = f"{PACKAGE}._C"
    try:
        module = importlib.import_module(name)
        built = str(module.build_info()["torch"])
        # The module uses C++ internals of torch. It may load with another release and then crash.
        if built.partition("+")[0] != torch.__version__.partition("+")[0]:
            raise ImportError("its torch is another release")
        return module, AVAILABLE
    except ImportError as error:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            left = Path(__file__).parents[1] / "_C.absent"  # by setup.py
            reason = left.read_text().strip() if left.exists() else "pip install -v shows why"
            return None, f"the compiled module was not built: {reason}"
        found = re.search(rb"fastclip built against torch ([^\0]+)", Path(spec.origin).read_bytes())
        built = found[1].decode() if found else "an unknown version"
        return None, (
            f"the compiled module was built against torch {built} and does not load with torch "
            f"{torch.__version__}: {str(error).splitlines()[0]}; install fastclip again, without "
            "pip's cache"
        )


def build_info() -> dict[str, object] | None:
    """Returns facts about the compiled module: compiler, torch, instruction sets, matrix product,
    threads, kinds and the CUDA build; None without the module."""
    return None if _MODULE is None else _MODULE.build_info()


def release_workspace() -> None:
    """Frees the buffers that the CPU engine reuses from step to step.

    When kept products and gradients of a MiB or more are freed, their memory stays in these buffers
    for the next step: at most 512 MiB, whatever `memory_budget` is.
    """
    if _MODULE is not None:
        _MODULE.release_workspace()


def backends() -> dict[str, str]:
    """Returns the name of every engine, with "available" or the reason why it cannot run here.

    "cpu" is the C++ engine for CPU tensors, "cuda" the C++ engine for CUDA tensors, "triton" the
    Triton engine for them, "torch" the plain PyTorch engine for any device, "reference" the dense
    loss.
    """
    return {
        "cpu": _CPU_AVAILABILITY,
        "cuda": _availability("cuda", None),
        "triton": _availability("triton", None),
        "torch": AVAILABLE,
        "reference": AVAILABLE,
    }


@functools.cache
def _warn_of_fallback(device: str, reason: str) -> None:
    more = " (`python -m fastclip` tells more)" if PACKAGE == "fastclip" else ""
    warnings.warn(
        f"fastclip runs its plain PyTorch engine on {device} tensors: {reason}{more}", stacklevel=2
    )


def interpreted() -> bool:
    """True if Triton's kernels run in its interpreter on CPU tensors, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _capability(device: int | None) -> tuple[int, int] | None:
    """The capability of a CUDA device; None without one."""
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
        return _CPU_AVAILABILITY
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
    """True if a card of this capability runs that code.

    sm_86 runs on cards of 8.6 to 8.9, compute_86 (PTX) on all from 8.6. With the suffix "a" both
    run on 8.6 alone, with "f" on 8.6 to 8.9.
    """
    kind, number, suffix = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", code).groups()
    target = (int(number[:-1]), int(number[-1]))
    if suffix == "a":
        return target == capability
    return target <= capability and (
        target[0] == capability[0] or (kind == "compute" and not suffix)
    )


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
        try:  # compiles the driver on first use, which needs a C compiler
            triton.runtime.driver.active.get_current_target()
        except Exception as error:
            return f"Triton's driver does not start: {(str(error) or repr(error)).splitlines()[0]}"
    return AVAILABLE


_FINDERS = {"cuda": _find_cuda, "triton": _find_triton}
_AVAILABILITY: dict[tuple[str, int | None], str] = {}


@constant_in_graphs
def _availability(engine: str, device: int | None) -> str:
    """A GPU engine's availability on a CUDA device, by default the current one. Triton is imported
    only if it can run."""
    if (engine, device) not in _AVAILABILITY:
        _AVAILABILITY[engine, device] = _FINDERS[engine](device)
    return _AVAILABILITY[engine, device]


@constant_in_graphs
def _rows(device: int | None, dtype: torch.dtype) -> list[preference.Row]:
    """The rows of the table that hold for a card and a dtype."""
    arithmetic, capability = arithmetic_of(dtype), _capability(device) or (0, 0)
    return [row for row in preference.TABLE if row.takes(arithmetic, capability)]


@constant_in_graphs
def _asked() -> str | None:
    """The value of FASTCLIP_GPU, or None."""
    name, known = os.environ.get("FASTCLIP_GPU") or None, (*_FINDERS, "torch")
    if name is not None and name not in known:
        raise ValueError(f"FASTCLIP_GPU must be one of {', '.join(map(repr, known))}, got {name!r}")
    return name


@constant_in_graphs
def _has_kind(engine: str, kind: str) -> bool:
    """True if an engine has the functions of a kind. An engine that cannot run has none."""
    if engine in ("torch", "reference"):
        return kind in KINDS
    if engine == "triton":
        if _availability(engine, None) != AVAILABLE:
            return False
        return kind in importlib.import_module(f"{PACKAGE}.triton_kernels.kinds").KINDS
    return kind in _COMPILED_KINDS


# The device types whose tensors an engine takes. Engines that are not listed take any.
_SERVED = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda",)}


def _serves(backend: str, device: torch.device) -> bool:
    if backend == "triton" and device.type == "cpu" and interpreted():
        return True
    return device.type in _SERVED.get(backend, (device.type,))


def _availability_of(backend: str, device: torch.device) -> str | None:
    """The availability of a backend, or None for an unknown name."""
    if backend in _FINDERS:
        return _availability(backend, device.index if device.type == "cuda" else None)
    return {"cpu": _CPU_AVAILABILITY, "torch": AVAILABLE, "reference": AVAILABLE}.get(backend)


def _default(device: torch.device, dtype: torch.dtype, logits: int, d: int, kind: str) -> str:
    if device.type == "cpu":
        reason = _CPU_AVAILABILITY
        if reason == AVAILABLE:
            return "cpu" if _has_kind("cpu", kind) else "torch"
    elif device.type == "cuda":
        if dtype == torch.float64:
            return "torch"
        engines, can_run = preference.order(_rows(device.index, dtype), logits, d), False
        for engine in engines:
            if _availability(engine, device.index) == AVAILABLE:
                if _has_kind(engine, kind):
                    return engine
                can_run = True
        if can_run:
            return "torch"
        reason = "; ".join(f"{engine}: {_availability(engine, device.index)}" for engine in engines)
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
    """Returns the engine for a number of logits, their width d, the dtype of products, and a kind.

    `backend=None` takes the first engine of `preference.py` that can run. Falling back to plain
    PyTorch warns once, unless the reason is a kind that the user registered. float64 on GPUs always
    goes to the plain PyTorch engine.

    Raises:
        ValueError: a backend that is unknown or cannot run, or does not serve this device or kind.
    """
    if backend is None and device.type == "cuda":
        backend = _asked()
    if backend is None:
        return _default(device, dtype, logits, d, kind)
    # Only this backend is asked: asking all would initialise CUDA needlessly, and would fail in a
    # process that was forked from one that uses CUDA. Only the error message below asks all.
    availability = _availability_of(backend, device)
    if availability == AVAILABLE and _serves(backend, device):
        if not _has_kind(backend, kind):
            raise ValueError(
                f"kind {kind!r} must be one that backend {backend!r} has, got one that only the "
                "plain PyTorch engine serves: use backend=None or 'torch'"
            )
        if backend in _FINDERS and dtype == torch.float64:
            return "torch"
        return backend
    known = backends()
    available = ", ".join(repr(name) for name, reason in known.items() if reason == AVAILABLE)
    if backend not in known:
        rule = f"backend must be None or one of {', '.join(map(repr, known))}"
    elif availability != AVAILABLE:
        rule = f"backend {backend!r} cannot run here ({availability})"
    else:
        kind = {"cpu": "CPU", "cuda": "CUDA"}[_SERVED[backend][0]]
        rule = f"backend {backend!r} takes {kind} tensors, got tensors on {device}"
    raise ValueError(f"{rule}; available: {available}; got {backend!r}")


operators.implement("torch", torch_engine)
operators.implement("triton", triton_kernels)
_MODULE, _CPU_AVAILABILITY = _load_extension()
_COMPILED_KINDS = frozenset(() if _MODULE is None else _MODULE.build_info()["kinds"])
