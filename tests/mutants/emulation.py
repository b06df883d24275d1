"""The build of the emulated CUDA engine, before the tests load it: a failure is not a kill."""

import os
import sys
from pathlib import Path

from mutants.objects import objects, run

FOLDER = "build/mutants/emulation"


def make(tree: Path, changed: str | None) -> None:
    """Builds the library of a tree, in a process that imports the tree's own tests."""
    path = f"{tree}{os.pathsep}{tree / 'tests'}"
    settings = [f"PYTHONPATH={path}", "PYTHONDONTWRITEBYTECODE=1"]
    run(["env", *settings, sys.executable, "-m", "mutants.emulation", changed or ""], tree)


def main(changed: str) -> None:
    """Builds the library of the tree in the working directory, where its tests look for it."""
    from support import cuda_case as case

    def command(unit: str) -> list[str]:
        return case.compile_unit(unit.removeprefix("csrc/"))

    def link(library: Path) -> None:
        units = [f"csrc/{unit}" for unit in case.UNITS]
        found = objects(Path.cwd(), FOLDER, units, command, changed or None)
        libraries = ["-L", str(case.TORCH / "lib"), "-ltorch", "-ltorch_cpu", "-lc10"]
        case.run([*case.compiler(), "-shared", *map(str, found), "-o", str(library), *libraries])

    case.link = link
    case.build()


if __name__ == "__main__":
    main(sys.argv[1])
