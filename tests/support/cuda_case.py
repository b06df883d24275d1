"""The CUDA engine on the CPU: its kernels and its torch front, compiled by the C++ compiler.

`emulated()` compiles csrc/cuda/engine.cu, with the headers of tests/emulation/cuda in place of
CUDA's, and csrc/cuda/ops.cpp, and loads the library: `torch.ops.fastclip.sweep.cuda` and the others
then take CPU tensors. The library is kept in build/cuda_emulation until a source changes.
"""

import ctypes
import fcntl
import functools
import hashlib
import importlib
import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

import fastclip

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "cuda_emulation"
HEADERS = ROOT / "tests/emulation/cuda"
TORCH = Path(torch.__file__).parent
FLAGS = ["-std=c++20", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast"]
UNITS = {
    "cuda/engine.cu": ["-I", str(HEADERS), "-Wno-unknown-pragmas"],
    "cuda/ops.cpp": ["-DFASTCLIP_EMULATED"],
}


def compiler() -> list[str] | None:
    command = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
    return command if shutil.which(command[0]) else None


def why_not() -> str | None:
    """Returns the reason why the emulated engine cannot be built here, or None."""
    if compiler() is None:
        return "no C++ compiler"
    if not fastclip.build_info():
        return "the compiled module is missing"
    return None


def compile_unit(name: str) -> list[str]:
    """Returns the command that compiles a unit, without the options for its output."""
    torchs = [TORCH / "include", TORCH / "include/torch/csrc/api/include"]
    includes = [*torchs, sysconfig.get_path("include")] if name.endswith(".cpp") else []
    system = [flag for folder in includes for flag in ("-isystem", str(folder))]
    source = str(ROOT / "csrc" / name)
    return [*compiler(), *FLAGS, "-Wall", *UNITS[name], *system, "-x", "c++", source]


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr[-5000:]}"


def build() -> Path:
    sources = sorted(
        path
        for folder in (ROOT / "csrc", HEADERS)
        for path in folder.rglob("*")
        if path.suffix in (".h", ".cu") or path.name == "ops.cpp"
    )
    digest = hashlib.sha256(torch.__version__.encode())
    for name in UNITS:
        digest.update(shlex.join(compile_unit(name)).encode())
    for path in sources:
        digest.update(path.read_bytes())
    library = FOLDER / f"{digest.hexdigest()[:16]}.so"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes wait for the library
        if not library.exists():
            link(library)
    return library


def link(library: Path) -> None:
    with TemporaryDirectory(dir=FOLDER) as scratch:
        objects = {name: f"{scratch}/{Path(name).stem}.o" for name in UNITS}
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda n: run([*compile_unit(n), "-c", "-o", objects[n]]), UNITS))
        made = f"{scratch}/{library.name}"
        libraries = ["-L", str(TORCH / "lib"), "-ltorch", "-ltorch_cpu", "-lc10"]
        run([*compiler(), "-shared", *objects.values(), "-o", made, *libraries])
        os.replace(made, library)


@functools.cache
def emulated() -> ctypes.CDLL:
    """Builds, loads and returns the library."""
    library = build()
    torch.ops.load_library(library)
    return ctypes.CDLL(str(library))


def on_cpu_tensors(patch: pytest.MonkeyPatch) -> None:
    """Makes the losses accept CPU tensors with `backend="cuda"`."""
    emulated()
    from fastclip.engine import backends

    patch.setitem(backends._AVAILABILITY, ("cuda", None), backends.AVAILABLE)
    patch.setitem(backends._SERVED, "cuda", ("cuda", "cpu"))


def library() -> ctypes.CDLL:
    """Returns the engine of this process: the emulated one, or on a GPU the installed one."""
    if torch.get_default_device().type == "cuda":
        return ctypes.CDLL(importlib.import_module("fastclip._C").__file__)
    return emulated()


@contextmanager
def chunks(rows: int, columns: int) -> Iterator[None]:
    """Context in which the engine cuts blocks into chunks of this many rows and columns."""
    shape = ctypes.c_int64(rows), ctypes.c_int64(columns)
    swap = library().fastclip_cuda_swap_chunk_shape
    swap(*map(ctypes.byref, shape))
    try:
        yield
    finally:
        swap(*map(ctypes.byref, shape))
