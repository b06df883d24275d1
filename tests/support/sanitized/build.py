"""Builds the extension with AddressSanitizer and UndefinedBehaviorSanitizer, beside the real one.

The package is a folder of links to the modules of fastclip, with an `_C` of its own. Objects are
kept until a source or a flag changes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "build" / "sanitized"
# A base of torch's classes has no type information that the check of `vptr` could read.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
SLOWER = ["-O1", "-g1", "-fno-omit-frame-pointer"]


def of_setup() -> ModuleType:
    """The module setup.py, whose flags these are, too."""
    spec = importlib.util.spec_from_file_location("setup_of_fastclip", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")


def runtime(name: str) -> str:
    """The path of one of the compiler's libraries."""
    command = [*compiler(), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def preloaded() -> str:
    """The libraries that the interpreter must load before all else. Without libstdc++ the sanitizer
    does not find the function that throws."""
    return " ".join(runtime(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6"))


def package() -> Path:
    """Returns the folder that holds the sanitized `fastclip`."""
    setup = of_setup()
    libraries = Path(torch.__file__).parent / "lib"
    include = [libraries.parent / "include", libraries.parent / "include/torch/csrc/api/include"]
    flags = [f for f in setup.CFLAGS if f not in ("-O3", "-g0")] + SLOWER + SANITIZERS
    flags += ["-fPIC", f"-DFASTCLIP_X86={int(setup.IS_X86)}", "-DTORCH_EXTENSION_NAME=_C"]
    flags += [f"-DFASTCLIP_TORCH_VERSION={json.dumps(torch.__version__)}"]
    flags += ['-DFASTCLIP_COMPILER="sanitized"', '-DFASTCLIP_WHY_NO_CUDA="sanitized"']
    for folder in (*include, sysconfig.get_path("include")):
        flags += ["-isystem", str(folder)]
    units = [(unit, []) for unit in setup.UNITS]
    for name, own in setup.CAPABILITIES.items():
        units += [(unit, [*own, f"-DFASTCLIP_CAPABILITY={name}"]) for unit in setup.DISPATCHED]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda unit: _object(unit[0], [*flags, *unit[1]]), units))
    target = FOLDER / "fastclip" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    _link_modules(target.parent)
    command = [*compiler(), "-shared", "-fopenmp", *SANITIZERS, *objects, "-o", str(target)]
    command += ["-L", str(libraries), f"-Wl,-rpath,{libraries}"]
    _run([*command, *(f"-l{name}" for name in ("torch", "torch_cpu", "torch_python", "c10"))])
    return FOLDER


def _link_modules(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in (ROOT / "fastclip").iterdir():
        if path.suffix != ".so" and path.name != "__pycache__":
            (folder / path.name).symlink_to(path.resolve())
    if not (folder / "triton_kernels").exists():  # an installation's link
        (folder / "triton_kernels").symlink_to(ROOT / "triton_kernels")


def _object(source: str, flags: list[str]) -> str:
    digest = hashlib.sha256(shlex.join([*compiler(), source, *flags]).encode())
    for path in [ROOT / source, *sorted((ROOT / "csrc").rglob("*.h"))]:
        digest.update(path.read_bytes())
    target = FOLDER / "objects" / f"{digest.hexdigest()[:20]}.o"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(".part.o")
        _run([*compiler(), *flags, "-c", str(ROOT / source), "-o", str(unfinished)])
        unfinished.rename(target)
    return str(target)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr[-5000:]}")


def mistakes() -> Path:
    """Returns a library with mistakes, built with the same sanitizers."""
    target = FOLDER / "mistakes.so"
    source = str(Path(__file__).with_name("mistakes.cpp"))
    _run([*compiler(), *SLOWER, *SANITIZERS, "-fPIC", "-shared", source, "-o", str(target)])
    return target
