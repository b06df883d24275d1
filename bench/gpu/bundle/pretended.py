"""A simulated card: Triton's kernels and their launchers are compiled for it, but not run.

All results are garbage. Libraries' matmuls are skipped, because on a CPU they would take hours. It
does not work under TRITON_INTERPRET.
"""

from __future__ import annotations

import atexit
import os
import shlex
import shutil
import subprocess
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import build, jit
from triton.runtime import driver as runtime

CAPABILITY = (9, 0)
# An H100's: a persistent kernel's grid depends on them.
PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132,
    total_memory=80 << 30, L2_cache_size=50 << 20, shared_memory_per_multiprocessor=228 << 10,
    shared_memory_per_block_optin=227 << 10, warp_size=32, regs_per_multiprocessor=65536,
)  # fmt: skip


class Anything:
    """Stands for a module that is not loaded: every attribute is a function that does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **options: None


class Driver:
    """The parts of a Triton driver that compilation needs."""

    utils = Anything()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def product(a: torch.Tensor, b: torch.Tensor, **options: Any) -> torch.Tensor:
    """Replaces a library's matmul: the right shape, with garbage values."""
    if options.get("out") is not None:
        return options["out"]
    dtype = options.get("out_dtype", a.dtype)
    return torch.empty(*a.shape[:-1], *b.shape[1:], dtype=dtype, device=a.device)


def _replace(owner: Any, name: str, value: object) -> None:
    """Sets an attribute, which must be there: otherwise nothing would use the new one."""
    getattr(owner, name)
    setattr(owner, name, value)


def pretend() -> None:
    """Makes the Triton engine take CPU tensors and compile for the card from now on."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("TRITON_INTERPRET must be 0: interpreted kernels are not compiled")
    runtime.set_active(Driver())
    _replace(torch.cuda, "get_device_capability", lambda device=None: CAPABILITY)
    _replace(torch.cuda, "get_device_properties", lambda device=None: PROPERTIES)
    from fastclip.engine import backends, fused_loss

    backends._AVAILABILITY["triton", None] = backends.AVAILABLE
    backends._SERVED["triton"] = ("cuda", "cpu")
    at_once = fused_loss._makes_gradients_at_once

    def as_on_a_card(*arguments: Any) -> bool:
        # On a CPU, the device of these tensors, the memory budget would decide.
        *inputs, options = arguments
        return at_once(*inputs, options._replace(memory_budget=1 << 62))

    _replace(fused_loss, "_makes_gradients_at_once", as_on_a_card)
    _skip_products()
    _compile_only()
    _build_launchers()


def _skip_products() -> None:
    torch.mm = torch.matmul = torch.Tensor.__matmul__ = torch.Tensor.mm = product
    torch.addmm = lambda total, a, b, **options: product(a, b, **options)
    # On a CPU `accumulate` first copies its operands to fp32, half a gigabyte each.
    from fastclip.triton_kernels import second_sweep

    _replace(second_sweep, "accumulate", lambda *arguments, **options: None)


def _compile_only() -> None:
    run, launchers = jit.JITFunction.run, set()

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(self, *arguments, grid=grid, warmup=True, **options)
        if compiled is not None and compiled.hash not in launchers:
            launchers.add(compiled.hash)
            nvidia.CudaLauncher(compiled.src, compiled.metadata)
        return compiled

    jit.JITFunction.run = compile_only


def _build_launchers() -> None:
    """Compiles launchers and the driver's utilities, which are C modules, into the cache. They are
    linked to an empty library with the driver's name, and are not loaded."""
    folder = Path(tempfile.mkdtemp(prefix="libcuda-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc") or "cc"
    library = [compiler, "-shared", "-x", "c", os.devnull, "-o", str(folder / "libcuda.so.1")]
    subprocess.run([*library, "-Wl,-soname,libcuda.so.1"], check=True)
    # The library defines nothing: with --as-needed the linker would drop it.
    wrapper = folder / "cc"
    wrapper.write_text(f'#!/bin/sh\nexec {shlex.quote(compiler)} -Wl,--no-as-needed "$@"\n')
    wrapper.chmod(0o755)
    os.environ["CC"] = str(wrapper)
    nvidia.libcuda_dirs = nvidia.library_dirs = lambda: [str(folder)]
    build._load_module_from_path = lambda name, path: Anything()
    nvidia.CudaUtils()
