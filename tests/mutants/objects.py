"""Objects of the compiled engines: only units that include a changed file are compiled again."""

import os
import shlex
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutants.trial import DoesNotBuild


def objects(
    tree: Path, folder: str, units: Sequence[str], command: Callable[[str], list[str]],
    changed: str | None,
) -> list[Path]:  # fmt: skip
    """Compiles units of a tree into a folder of it. command: maps a unit to the compiler's command
    without outputs. changed: the file that a mutant changed; objects of units that do not include
    it are those of the last call without a mutant (None)."""
    kept = tree / folder / "objects"
    own = tree / folder / "mutant" if changed else kept
    own.mkdir(parents=True, exist_ok=True)

    def compiled(unit: str) -> Path:
        name = unit.replace("/", "-") + ".o"
        if changed and not includes((kept / name).with_suffix(".d"), changed):
            return kept / name
        run([*command(unit), "-w", "-MMD", "-c", "-o", str(own / name)], tree)
        return own / name

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compiled, units))


def includes(dependencies: Path, file: str) -> bool:
    """True if a file is among those that the compiler read, whose paths may hold `..`."""
    paths = map(os.path.normpath, dependencies.read_text().replace("\\\n", " ").split())
    return any(path == file or path.endswith(f"/{file}") for path in paths)


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")


def run(command: list[str], tree: Path) -> None:
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DoesNotBuild(f"{shlex.join(command)}\n{done.stderr[-2000:]}")
