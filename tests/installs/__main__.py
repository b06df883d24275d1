"""Installs fastclip in every way into an environment of every Python, and checks each.

    python -m tests.installs                      # make test-install
    python -m tests.installs --pythons 3.12 3.13 --folder /elsewhere --ways tree

An environment is FOLDER/VERSION. One that exists is used as it is; otherwise it gets the torch of
.requirements.txt. The first way compiles for minutes; others reuse its objects.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from . import ways

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
NEEDED = ("torch", "setuptools", "wheel", "ninja", "pybind11")


def interpreter(version: str) -> str | None:
    """Returns the path of a Python: on PATH, else among pyenv's."""
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    return shutil.which(f"python{version}") or (str(pyenv[-1]) if pyenv else None)


def environment(version: str, folder: Path) -> Path | None:
    """Returns the Python of an environment, which is made if need be; None without that Python."""
    python = folder / version / "bin/python"
    if not python.exists():
        if (found := interpreter(version)) is None:
            return None
        subprocess.run([found, "-m", "venv", str(folder / version)], check=True)
        pinned = (ROOT / ".requirements.txt").read_text()
        packages = [line for name in NEEDED for line in re.findall(rf"^{name}==.*", pinned, re.M)]
        print(f"Python {version}: installs {', '.join(packages)}", flush=True)
        subprocess.run([str(python), "-m", "pip", "-q", "install", *packages], check=True)
    return python


def distributions(folder: Path) -> tuple[Path, Path]:
    """Makes the source distribution and the pure wheel, with the running Python."""
    shutil.rmtree(folder, ignore_errors=True)
    setup = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base"]
    folder.mkdir(parents=True)
    subprocess.run(
        [*setup, str(folder), "sdist", "--dist-dir", str(folder)],
        cwd=ROOT, env=ways.variables(FASTCLIP_SKIP_EXTENSION="1"), check=True,
    )  # fmt: skip
    (sdist,) = folder.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "-q", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*pip, "--wheel-dir", str(folder), str(sdist)],
        env=ways.variables(FASTCLIP_SKIP_EXTENSION="1"), check=True,
    )  # fmt: skip
    (wheel,) = folder.glob("*-py3-none-any.whl")
    return sdist, wheel


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.installs")
    parser.add_argument("--pythons", nargs="+", default=PYTHONS, metavar="VERSION")
    parser.add_argument("--folder", type=Path, default=ROOT / "build/installs")
    parser.add_argument("--ways", default="", metavar="TEXT", help="only ways whose name has it")
    options = parser.parse_args()
    folder = options.folder.resolve()
    sdist, wheel = distributions(folder / "dist")
    failed = 0
    for version in options.pythons:
        python = environment(version, folder)
        if python is None:
            print(f"{version:<6}there is no python{version} here", flush=True)
            continue
        tree = folder / f"tree-{version}"
        shutil.rmtree(tree, ignore_errors=True)
        with tarfile.open(sdist) as archive:
            archive.extractall(folder / f"unpack-{version}")
        (unpacked,) = (folder / f"unpack-{version}").iterdir()
        unpacked.rename(tree)
        for way in (way for way in ways.WAYS if options.ways in way.name):
            began = time.monotonic()
            problem = ways.run(way, python, ways.Sources(tree, sdist, wheel))
            failed += bool(problem)
            seconds = time.monotonic() - began
            print(f"{version:<6}{way.name:<28}{problem or 'ok':<10} {seconds:.0f} s", flush=True)
    print(f"{failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
