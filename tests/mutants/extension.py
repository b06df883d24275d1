"""A quick build of `fastclip._C` for mutants of the CPU engine.

The engine is compiled for this machine's instruction set alone, without much optimisation, and only
units that include the changed file are compiled again: about 13 s each.
"""

import importlib.util
import shutil
import sysconfig
from pathlib import Path
from types import ModuleType

import torch
from torch.utils.cpp_extension import include_paths

from mutants.objects import compiler, objects, run
from mutants.tree import LIBRARY

# Engines of other instruction sets, which this machine does not choose.
OTHERS = """
#include <cstdlib>
#include "cpu/problem.h"
#include "cpu/retrieval/problem.h"
#define OTHER(capability)                                              \\
  namespace fastclip { namespace capability {                          \\
  int run(Problem&) { abort(); }                                       \\
  double largest_norm(const Features&, int64_t, int64_t, Dtype) { abort(); } \\
  void find_ranks(const RankScan&) { abort(); }                        \\
  void find_top(const TopScan&) { abort(); }                           \\
  void draw(const DrawScan&) { abort(); }                              \\
  void score(const PairScan&) { abort(); }                             \\
  } }
"""
FOLDER = "build/mutants/extension"


def make(tree: Path, changed: str | None) -> None:
    """Builds the library of a tree. changed: the file that a mutant changed; None: all units."""
    setup = _setup(tree)
    capability = torch.backends.cpu.get_cpu_capability()
    chosen = next((c for c in reversed(setup.CAPABILITIES) if capability.startswith(c)), "DEFAULT")
    others = Path(FOLDER) / "others.cpp"
    (tree / others).parent.mkdir(parents=True, exist_ok=True)
    (tree / others).write_text(
        OTHERS + "".join(f"OTHER({c})\n" for c in setup.CAPABILITIES if c != chosen)
    )
    system = [f"-isystem{path}" for path in (*include_paths(), sysconfig.get_path("include"))]

    def command(unit: str) -> list[str]:
        # With -O1 alone GCC makes no fused multiply-adds, which accuracy needs.
        flags = [*setup.CFLAGS, "-O1", "-fexpensive-optimizations", "-fPIC", "-Icsrc"]
        flags += _macros(setup)
        if unit in setup.DISPATCHED:
            flags += [f"-DFASTCLIP_CAPABILITY={chosen}", *setup.CAPABILITIES[chosen]]
        return [*compiler(), *flags, *system, unit]

    made = tree / FOLDER / ("mutant.so" if changed else "library.so")
    found = objects(tree, FOLDER, (*setup.UNITS, *setup.DISPATCHED, str(others)), command, changed)
    libraries = ["-L", str(Path(torch.__file__).parent / "lib")]
    libraries += ["-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10"]
    link = [*compiler(), "-shared", "-fopenmp", *map(str, found), "-o", str(made)]
    run([*link, *libraries], tree)
    _use(made, tree)


def undo(tree: Path) -> None:
    """Puts the library without a mutant back."""
    _use(tree / FOLDER / "library.so", tree)


def _use(library: Path, tree: Path) -> None:
    # Not written over: a process that lives on may have mapped the file.
    (tree / LIBRARY).unlink(missing_ok=True)
    shutil.copy(library, tree / LIBRARY)


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
