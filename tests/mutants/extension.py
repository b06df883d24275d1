"""A quick build of `fastclip._C` for mutants of the CPU engine.

The engine is compiled for this machine's instruction set alone, without much optimisation, and only
units that include the changed file are compiled again: about 13 s each.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch
from torch.utils.cpp_extension import include_paths

from mutants.tree import LIBRARY
from mutants.trial import DoesNotBuild

UNITS = ("csrc/module.cpp", "csrc/cpu/ops.cpp", "csrc/cpu/engine.cpp")
# Engines of other instruction sets, which this machine does not choose.
OTHERS = """
#include <cstdlib>
#include "cpu/problem.h"
#define OTHER(capability)                                              \\
  namespace fastclip { namespace capability {                          \\
  int run(Problem&) { abort(); }                                       \\
  double largest_norm(const Features&, int64_t, int64_t, Dtype) { abort(); } \\
  } }
"""
FOLDER = "build/mutants"


def make(tree: Path, changed: str | None) -> None:
    """Builds the library of a tree. changed: the file that a mutant changed; None: all units."""
    folder = tree / FOLDER
    own = folder / ("mutant" if changed else "objects")
    own.mkdir(parents=True, exist_ok=True)
    setup = _setup(tree)
    capability = torch.backends.cpu.get_cpu_capability()
    chosen = next((c for c in reversed(setup.CAPABILITIES) if capability.startswith(c)), "DEFAULT")
    others = folder / "others.cpp"
    others.write_text(OTHERS + "".join(f"OTHER({c})\n" for c in setup.CAPABILITIES if c != chosen))

    def compiled(unit: str) -> Path:
        name = Path(unit).with_suffix(".o").name
        kept = folder / "objects" / name
        if changed and changed not in kept.with_suffix(".d").read_text():
            return kept
        flags = [*setup.CFLAGS, "-O1", "-w", "-fPIC", "-MMD", "-I", "csrc", *_macros(setup)]
        if unit == UNITS[-1]:
            flags += [f"-DFASTCLIP_CAPABILITY={chosen}", *setup.CAPABILITIES[chosen]]
        system = [flag for path in _includes() for flag in ("-isystem", path)]
        _run([*_compiler(), *flags, *system, "-c", unit, "-o", str(own / name)], tree)
        return own / name

    with ThreadPoolExecutor(2) as pool:
        units = UNITS if changed else (*UNITS, str(others))
        objects = list(pool.map(compiled, units))
    if changed:
        objects.append(folder / "objects/others.o")
    libraries = ["-L", str(Path(torch.__file__).parent / "lib")]
    libraries += ["-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10"]
    made = own / "library.so"
    _run(
        [*_compiler(), "-shared", "-fopenmp", *map(str, objects), "-o", str(made), *libraries], tree
    )
    os.replace(made, tree / LIBRARY) if changed else shutil.copy(made, tree / LIBRARY)


def undo(tree: Path) -> None:
    """Puts the library without a mutant back."""
    shutil.copy(tree / FOLDER / "objects/library.so", tree / LIBRARY)


def _setup(tree: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_of_fastclip", tree / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _macros(setup: ModuleType) -> list[str]:
    return [
        "-DTORCH_EXTENSION_NAME=_C", "-DTORCH_API_INCLUDE_EXTENSION_H",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-DFASTCLIP_X86={int(setup.IS_X86)}",
        f'-DFASTCLIP_TORCH_VERSION="{torch.__version__}"',
        f'-DFASTCLIP_COMPILER="{setup.compiler_version()}"',
        '-DFASTCLIP_WHY_NO_CUDA="this is a build for mutants"',
    ]  # fmt: skip


def _includes() -> list[str]:
    return [*include_paths(), sysconfig.get_path("include")]


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")


def _run(command: list[str], tree: Path) -> None:
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DoesNotBuild(f"{shlex.join(command)}\n{done.stderr[-2000:]}")
