"""Builds C++ programs that hold an engine and stand-ins for what it is linked with, and runs them.

Objects are cached in build/emulation, named after a hash of the preprocessed source, the flags and
the compiler. A changed header recompiles one object, an unchanged tree none.
"""

import contextlib
import functools
import hashlib
import os
import platform
import resource
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
KEPT = ROOT / "build" / "emulation"
DAY = 86400

FLAGS = ("-std=c++20", "-O1", "-g", "-Wall", "-Wno-unknown-pragmas", "-pthread")
SANITIZERS = {
    "none": (),
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-fsanitize=thread",),
}


class Unit(NamedTuple):
    """A source, the folder of its stand-ins for headers, its flags, and the csrc it includes."""

    source: Path
    headers: Path
    flags: tuple[str, ...] = ()
    csrc: Path = CSRC

    @property
    def includes(self) -> list[str]:
        return ["-I", str(self.headers), "-I", str(self.csrc)]


@functools.cache
def compiler() -> tuple[list[str], str]:
    """Returns the compiler's command and its version."""
    command = shlex.split(os.environ.get("CXX", "g++"))
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]}")
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    return command, version.stdout


@functools.cache
def _links(sanitizer: str) -> bool:
    command = [*compiler()[0], *SANITIZERS[sanitizer], "-x", "c++", "-", "-o", os.devnull]
    return subprocess.run(command, input=b"int main() {}", capture_output=True).returncode == 0


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr[-5000:]}"
    return done.stdout


def _make(path: Path, command: list[str]) -> Path:
    """Runs the command unless its output exists.

    Other processes may write and remove files at the same time; the last file of a name stays.
    """
    with contextlib.suppress(FileNotFoundError):
        os.utime(path)
        return path
    KEPT.mkdir(parents=True, exist_ok=True)
    for old in KEPT.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if time.time() - old.stat().st_mtime > DAY:
                old.unlink()
    with tempfile.NamedTemporaryFile(dir=KEPT, delete=False) as file:
        _run([*command, "-o", file.name])
    os.replace(file.name, path)
    return path


def preprocessed(unit: Unit) -> str:
    command = [*compiler()[0], *unit.flags, *unit.includes, "-x", "c++", "-E", str(unit.source)]
    return _run(command).replace(str(unit.csrc), "csrc")


def _object(unit: Unit) -> Path:
    command, version = compiler()
    key = "\0".join([preprocessed(unit), version, *unit.flags])
    key = hashlib.sha256(key.encode()).hexdigest()[:20]
    # Reports name files as csrc/..., wherever a copy of csrc lies.
    names = [f"-ffile-prefix-map={unit.csrc}=csrc"]
    names += [f"-ffile-prefix-map={unit.headers}={unit.headers.name}_emulation"]
    source = ["-x", "c++", "-c", str(unit.source)]
    return _make(KEPT / f"{key}.o", [*command, *unit.flags, *names, *unit.includes, *source])


def build(units: Sequence[Unit], sanitizer: str = "none", link: Sequence[str] = ()) -> Path:
    """Returns the built program; skips the test if the compiler lacks the sanitizer. link: flags
    for the linker."""
    if not _links(sanitizer):
        pytest.skip(f"{compiler()[0][0]} has no -fsanitize={sanitizer} here")
    flags = (*FLAGS, *SANITIZERS[sanitizer])
    with ThreadPoolExecutor(2) as pool:
        every = [unit._replace(flags=(*flags, *unit.flags)) for unit in units]
        objects = list(pool.map(_object, every))
    key = "".join([*(o.stem for o in objects), *link])
    key = hashlib.sha256(key.encode()).hexdigest()[:20]
    return _make(KEPT / key, [*compiler()[0], *flags, *map(str, objects), *link])


def run(program: Path, *arguments: str, seconds: int = 600) -> subprocess.CompletedProcess[str]:
    """Runs a program, which sanitizers end at their first report."""
    options = {
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1",
    }

    def start(*prefix: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*prefix, str(program), *arguments],
            capture_output=True, text=True, timeout=seconds, env=os.environ | options, check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)),
        )  # fmt: skip

    done = start()
    # Some Linux kernels randomise addresses more than the sanitizer supports.
    if "unexpected memory mapping" in done.stderr:
        if shutil.which("setarch") is None:
            pytest.skip("ThreadSanitizer cannot run with this much address-space randomisation")
        done = start("setarch", platform.machine(), "-R")
    return done
