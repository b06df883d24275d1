"""Makes a bundle: `python -m bench.gpu.bundle FOLDER`, in an environment like the card's machine.

Everything is made from a copy of the sources in build/gpu-bundle; this tree's extension and its
environment stay untouched. Wheels that cannot be downloaded are named; without its extension or its
cache, making the bundle fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from .. import suite
from ..process import ROOT
from . import contents

WORK = ROOT / "build" / "gpu-bundle"
TREE = WORK / "tree"
COPIED = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "fastclip", "csrc",
          "triton_kernels", "bench", "tests")  # fmt: skip
CUTLASS = "nvidia-cutlass==4.2.0.0"
# Peers, open_clip, and those of its dependencies that few machines have.
WHEELS = ("siglip_kernel==0.1.2", "memeff==0.3.1", "inf_cl==1.2.1", "liger_kernel==0.8.5",
          "open_clip_torch==3.3.0", "ftfy==6.3.1", "wcwidth==0.9.4")  # fmt: skip
# Files of Triton's cache: code, its description, launchers. Other files are intermediate steps.
CACHED = (".cubin", ".json", ".so")


class Missing(Exception):
    """Raised, with the reason, if a part of the bundle cannot be made."""


def run(command: Iterable[str], folder: Path = ROOT, quiet: bool = False, **more: str) -> int:
    """Runs a command; returns its exit status."""
    output = subprocess.DEVNULL if quiet else None
    environment = {**os.environ, **more}
    return subprocess.run(
        list(command), cwd=folder, env=environment, stdout=output, stderr=output, check=False
    ).returncode


def copy_tree() -> None:
    """Copies the current sources. Objects of an earlier build stay; ninja rebuilds changed ones."""
    for name in COPIED:
        source, target = ROOT / name, TREE / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.so", "results")
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target, ignore=ignore)
        else:
            TREE.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    # Laid out as in an installation; fastclip is imported only from here.
    shutil.copytree(ROOT / "triton_kernels", TREE / "fastclip" / "triton_kernels",
                    ignore=shutil.ignore_patterns("__pycache__"))  # fmt: skip
    site = TREE / "site"
    site.mkdir(exist_ok=True)
    if not (site / "fastclip").exists():
        (site / "fastclip").symlink_to("../fastclip")


def make_extension(bundle: Path) -> str:
    """Builds the extension for the running Python and torch, and for Hopper cards."""
    cutlass = WORK / "cutlass"
    if not cutlass.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        if run([*pip, "--target", str(cutlass), CUTLASS]):
            raise Missing(f"pip has no {CUTLASS}")
    cards = os.environ.get("TORCH_CUDA_ARCH_LIST", "9.0")
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    code = run(
        build, TREE, FASTCLIP_CUDA="1", FASTCLIP_REQUIRE_EXTENSION="1",
        FASTCLIP_SKIP_EXTENSION="0", TORCH_CUDA_ARCH_LIST=cards,
        CUTLASS_PATH=str(cutlass / "cutlass_library" / "source"),
    )  # fmt: skip
    made = sorted((TREE / "fastclip").glob("_C*.so"))
    if code or not made:
        raise Missing(f"setup.py ended with {code}")
    shutil.copy2(made[0], bundle / made[0].name)
    describe(bundle, sources=contents.digest_of_sources(TREE))
    return made[0].name


def make_cache(bundle: Path) -> str:
    """Fills and packs Triton's cache for all launches of `make gpu`, on a simulated card."""
    cache = Path(contents.TRITON_CACHE)
    shutil.rmtree(cache, ignore_errors=True)
    settings = {
        "TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0", "PYTHONPATH": str(TREE / "site"),
        "FASTCLIP_TEST_DEVICE": "cpu",
    }  # fmt: skip
    all_compile = warm(settings, tests=True)
    found = [path for path in sorted(cache.rglob("*")) if path.suffix in CACHED]
    kernels = sum(path.suffix == ".cubin" for path in found)
    if not kernels:
        raise Missing("no kernel was compiled")
    with tarfile.open(bundle / contents.CACHE, "w:xz", preset=9) as archive:
        for path in found:
            archive.add(path, str(path.relative_to(cache)))
    # The unpacked cache, as it will be used, must contain everything that is compiled.
    shutil.rmtree(cache)
    with tarfile.open(bundle / contents.CACHE) as archive:
        archive.extractall(cache, filter="data")
    warm(settings, tests=False)
    missing = sum(path.suffix == ".cubin" for path in cache.rglob("*")) - kernels
    if missing:
        raise Missing(f"{missing} kernels were compiled although they are in the bundle")
    if not all_compile:
        raise Missing(f"{kernels} kernels are in it, but some launches above do not compile")
    return f"{kernels} kernels"


def warm(settings: dict[str, str], tests: bool) -> bool:
    """Compiles into the cache, on all cores; True if all launches, except the tests', compile."""
    count = os.cpu_count() or 1
    module = [sys.executable, "-m", "bench.gpu.bundle.warm"]
    children = [
        subprocess.Popen([*module, str(k), str(count)], cwd=TREE, env={**os.environ, **settings})
        for k in range(count)
    ]
    codes = [child.wait() for child in children]
    if tests:
        command = [*suite.command("card"), "-p", "bench.gpu.bundle.plugin"]
        paths = os.pathsep.join([settings["PYTHONPATH"], str(TREE)])
        run(command, TREE, quiet=True, **{**settings, "PYTHONPATH": paths})
    return not any(codes)


def make_wheels(bundle: Path) -> str:
    """Downloads the wheels of peers; returns their number and the names of missing ones."""
    folder, absent = bundle / contents.WHEELS, []
    folder.mkdir(exist_ok=True)
    for name in WHEELS:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        if run([*pip, "--only-binary=:all:", "--dest", str(folder), name]):
            absent.append(name)
    count = len(list(folder.glob("*.whl")))
    return f"{count} wheels" + (f"; not available: {', '.join(absent)}" if absent else "")


PARTS = {"extension": make_extension, "cache": make_cache, "wheels": make_wheels}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.bundle")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args(arguments)
    bundle = options.folder.resolve()
    bundle.mkdir(parents=True, exist_ok=True)
    copy_tree()
    describe(bundle)
    failed = False
    for part in options.parts:
        began = time.monotonic()
        try:
            told = PARTS[part](bundle)
        except Missing as reason:
            failed, told = True, f"FAILED: {reason}"
        print(f"{part}: {told}, in {time.monotonic() - began:.0f} s", flush=True)
    size = contents.size_of(bundle)
    print(f"{size / 2**20:.1f} MiB in {bundle}; make gpu BUNDLE={options.folder}")
    if size > contents.LARGEST:
        print(f"bundle: it must have at most {contents.LARGEST >> 20} MiB", file=sys.stderr)
        failed = True
    return 1 if failed else 0


def describe(bundle: Path, **changes: str) -> None:
    """Writes the bundle's description: versions, and the digest of its extension's sources."""
    import triton

    file = bundle / contents.DESCRIPTION
    told = json.loads(file.read_text()) if file.exists() else {"sources": ""}
    told |= {
        "python": sys.version.split()[0], "torch": torch.__version__, "triton": triton.__version__,
        "triton_cache": contents.TRITON_CACHE, **changes,
    }  # fmt: skip
    file.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
