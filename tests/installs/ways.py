"""The ways to install, and what `python -m fastclip` must say after each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

REUSE = Path(__file__).resolve().parents[1] / "support/reuse_objects.py"


class Way(NamedTuple):
    name: str
    source: str  # a field of Sources
    options: tuple[str, ...] = ()  # of pip install
    reason: str = ""  # why the CPU engine is missing; "": it is there
    settings: tuple[tuple[str, str], ...] = ()  # environment variables
    bare: bool = False  # into an environment without torch


PLAIN = ("--no-build-isolation",)
WAYS = (
    Way("tree", "tree", PLAIN),
    Way("tree, isolated", "tree"),
    Way("sdist", "sdist", PLAIN),
    Way("sdist, isolated", "sdist"),
    Way("sdist, CXX=/bin/false", "sdist", PLAIN, "no working C++", (("CXX", "/bin/false"),)),
    Way("sdist, no compiler", "sdist", PLAIN, "no working C++", (("PATH", "/nonexistent"),)),
    Way("pure wheel", "wheel", (), "FASTCLIP_SKIP_EXTENSION=1"),
    Way("sdist, isolated, no torch", "sdist", (), "they need torch", bare=True),
)


class Sources(NamedTuple):
    tree: Path
    sdist: Path
    wheel: Path


def variables(**more: str) -> dict[str, str]:
    """The environment without variables that affect a build, and with `more`."""
    affecting = ("FASTCLIP_", "CXX", "PYTHONPATH", "TORCH_CUDA_ARCH_LIST", "CUTLASS_PATH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(affecting)}
    return kept | {"FASTCLIP_CUDA": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"} | more


def run(way: Way, python: Path, sources: Sources) -> str:
    """Installs in a way and checks the result; returns what is wrong, or an empty string."""
    with tempfile.TemporaryDirectory() as empty:
        if way.bare:
            subprocess.run([str(python), "-m", "venv", empty], check=True)
            python = Path(empty, "bin/python")
        settings = dict(way.settings)
        if not way.reason and way.source == "sdist":
            settings["CXX"] = f"{python} {REUSE} {sources.tree} c++"
        command = [str(python), "-m", "pip", "-q", "install", "--no-deps", "--force-reinstall"]
        command += ["--no-cache-dir", *way.options, str(getattr(sources, way.source))]
        done = subprocess.run(
            command, env=variables(**settings), cwd=empty, capture_output=True, text=True
        )
        if done.returncode:
            return f"pip fails: {done.stderr.strip().splitlines()[-1]}"
        if way.bare:
            (left,) = Path(empty).glob("lib/python*/site-packages/fastclip/_C.absent")
            told = left.read_text()
            return "" if way.reason in told else f"the reason is {told.strip()!r}"
        problem = _diagnosed(way, python, empty)
        if way.source == "tree" and not problem:
            _keep_library(python, sources.tree)
        return problem


def _diagnosed(way: Way, python: Path, folder: str) -> str:
    done = subprocess.run(
        [str(python), "-m", "fastclip", "--json"],
        env=variables(), cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        return f"python -m fastclip ends with {done.returncode}: {done.stderr[-300:]}"
    found = json.loads(done.stdout)
    if not found["system"]["package"].startswith(str(python.parents[1])):
        return f"it ran {found['system']['package']}"
    told = found["engines"]["cpu"]
    checked = {row["engine"] for row in found["checks"]}
    if not way.reason:
        return "" if told == "available" and {"cpu", "torch"} <= checked else f"cpu: {told}"
    return "" if way.reason in told and "cpu" not in checked else f"cpu: {told}"


def _keep_library(python: Path, tree: Path) -> None:
    """Puts the built library where reuse_objects.py looks for it."""
    (built,) = tree.glob(f"build/lib*{python.parents[1].name.replace('.', '')}/fastclip/_C*.so")
    shutil.copy2(built, tree / "fastclip")
