"""A card that is not here: Triton's kernels are compiled for it, with their launchers, not run.

What computes on it computes garbage. Products of libraries are skipped: on a CPU they would take
hours. Not under TRITON_INTERPRET.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import build, jit
from triton.runtime import driver as runtime

CAPABILITY = (9, 0)
# Of an H100: what a persistent kernel's grid depends on.
PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132,
    total_memory=80 << 30, L2_cache_size=50 << 20, shared_memory_per_multiprocessor=228 << 10,
    shared_memory_per_block_optin=227 << 10, warp_size=32, regs_per_multiprocessor=65536,
)  # fmt: skip


class Driver:
    """Enough of a driver to compile with."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Products(TorchDispatchMode):
    """Matrix products whose result is not looked at."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name not in ("mm", "addmm", "bmm"):
            return func(*args, **kwargs)
        if "out" in kwargs:
            return kwargs["out"]
        a, b = args[-2:] if name != "addmm" else args[1:3]
        return torch.empty(*a.shape[:-1], b.shape[-1], dtype=a.dtype)


def pretend() -> None:
    """From now on the Triton engine takes CPU tensors and compiles for the card."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("TRITON_INTERPRET must be 0: interpreted kernels are not compiled")
    runtime.set_active(Driver())
    torch.cuda.get_device_capability = lambda device=None: CAPABILITY
    torch.cuda.get_device_properties = lambda device=None: PROPERTIES
    backends = importlib.import_module("fastclip.backends")  # beside it there is a function
    backends._STATUS["triton", None] = backends.AVAILABLE
    backends._SERVED["triton"] = ("cuda", "cpu")
    _compile_only()
    _build_launchers()


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
    """Launchers and the driver's own module are C, compiled where they are missing: they go into
    the cache, linked to a library of the driver's name, and are not loaded."""
    folder = Path(tempfile.mkdtemp(prefix="libcuda-"))
    empty = ["cc", "-shared", "-x", "c", os.devnull, "-o", str(folder / "libcuda.so.1")]
    subprocess.run([*empty, "-Wl,-soname,libcuda.so.1"], check=True)
    nvidia.libcuda_dirs = nvidia.library_dirs = lambda: [str(folder)]

    def compile_module(
        src: str, name: str, library_dirs: Any = None, include_dirs: Any = None,
        libraries: Any = None, ccflags: Any = None,
    ) -> Any:  # fmt: skip
        key = build.hashlib.sha256((src + build.platform_key()).encode()).hexdigest()
        suffix = build.sysconfig.get_config_var("EXT_SUFFIX")
        cache = build.get_cache_manager(key)
        if cache.get_file(f"{name}{suffix}") is None:
            with tempfile.TemporaryDirectory() as place:
                source = Path(place) / f"{name}.c"
                source.write_text(src)
                # The empty library defines nothing, and must be asked for at run time all the same.
                flags = ["-Wl,--no-as-needed", *(ccflags or [])]
                made = build._build(
                    name, str(source), place, library_dirs or [], include_dirs or [],
                    libraries or [], flags,
                )  # fmt: skip
                cache.put(Path(made).read_bytes(), f"{name}{suffix}", binary=True)
        return types.SimpleNamespace(launch=None)

    nvidia.compile_module_from_src = compile_module
    compile_module(
        (Path(nvidia.dirname) / "driver.c").read_text(), "cuda_utils", nvidia.library_dirs(),
        nvidia.include_dirs, nvidia.libraries,
    )  # fmt: skip
