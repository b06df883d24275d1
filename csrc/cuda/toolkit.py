"""The search for nvcc and the cards to compile for; setup.py runs this file.

nvcc comes from CUDA_HOME, else from PATH, else from torch's own search. TORCH_CUDA_ARCH_LIST names
the cards.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

# The default cards, if nvcc knows them. sm_80 also runs on 8.7, sm_100 on 10.3, the PTX on later.
CUDA_ARCHITECTURES = ("80", "86", "89", "90", "100", "120")


class NoCuda(Exception):
    """The reason why the CUDA engine cannot be built, and nvcc's output, if any."""

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(reason)
        lines = output.strip().splitlines()
        if len(lines) > LAST_LINES:
            lines[:-LAST_LINES] = [f"[{len(lines) - LAST_LINES} lines before these]"]
        self.explained = "\n  ".join([reason, *lines])  # pip may show only the error


LAST_LINES = 40  # of nvcc's output in an error


class Toolkit(NamedTuple):
    """An nvcc and its targets: sm_90 is code for a card, compute_90 is PTX."""

    nvcc: str
    version: str
    library_dirs: list[str]
    architectures: list[str]


def cuda_architectures(asked: str, known: Collection[str]) -> list[str]:
    """Returns the targets of TORCH_CUDA_ARCH_LIST, or defaults. known: the targets of nvcc."""
    if not asked.strip():
        served = [number for number in CUDA_ARCHITECTURES if f"sm_{number}" in known]
        if not served:
            raise NoCuda(f"this nvcc compiles for none of sm_{', sm_'.join(CUDA_ARCHITECTURES)}")
        return [*(f"sm_{number}" for number in served), f"compute_{served[-1]}"]
    found = []
    for name in re.split(r"[;,\s]+", asked.strip(" ;,")):
        parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if parts is None:
            rule = "TORCH_CUDA_ARCH_LIST must be numbers such as '8.0;9.0a;12.0+PTX'"
            raise NoCuda(f"{rule}, got {name!r}")
        major, minor, suffix, with_ptx = parts.groups()
        if int(major) < 8:  # the list may serve other packages, too; the engine needs 8.0
            continue
        if f"sm_{major}{minor}" not in known:
            raise NoCuda(f"TORCH_CUDA_ARCH_LIST has {name}, which this nvcc does not compile for")
        found += [f"sm_{major}{minor}{suffix}"]
        found += [f"compute_{major}{minor}{suffix}"] if with_ptx else []
    if not found:
        raise NoCuda(f"TORCH_CUDA_ARCH_LIST must have a card of 8.0 or later, got {asked!r}")
    return list(dict.fromkeys(found))


def find_nvcc() -> str:
    """Returns the path of nvcc: under CUDA_HOME, else on PATH, else in the toolkit torch finds."""
    home = os.environ.get("CUDA_HOME")
    if home:
        nvcc, searched = None, f"under CUDA_HOME={home}"
    else:
        from torch.utils.cpp_extension import CUDA_HOME as home  # such as /usr/local/cuda

        nvcc = shutil.which("nvcc")
        searched = f"on PATH{f' or under {home}' if home else ''}, and CUDA_HOME is not set"
    nvcc = nvcc or (shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None)
    if nvcc is None:
        raise NoCuda(f"there is no nvcc {searched}")
    return nvcc


def find_toolkit(torch_version: str, torch_cuda: str | None) -> Toolkit:
    """Returns the nvcc that fits torch, or raises NoCuda."""
    asked = os.environ.get("FASTCLIP_CUDA", "")
    if asked not in ("", "0", "1"):
        sys.exit(f"fastclip: FASTCLIP_CUDA must be 0 or 1, got {asked!r}")
    if asked == "0":
        raise NoCuda("FASTCLIP_CUDA=0 left it out")
    if torch_cuda is None:
        raise NoCuda(f"torch {torch_version} is not built for CUDA")
    nvcc = find_nvcc()

    def ask(*arguments: str) -> str:
        done = subprocess.run([nvcc, *arguments], capture_output=True, text=True)
        output = done.stdout + done.stderr
        if done.returncode:
            raise NoCuda(f"{shlex.join([nvcc, *arguments])} fails", output)
        return output

    told = re.search(r"release (\d+\.\d+)|$", ask("--version"))
    version = told[1] or "unknown"
    if version.partition(".")[0] != torch_cuda.partition(".")[0]:
        raise NoCuda(f"torch {torch_version} is built for CUDA {torch_cuda}, nvcc is {version}")
    cards = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    architectures = cuda_architectures(cards, ask("--list-gpu-code").split())
    # A dry run prints the folders that nvcc itself would link from.
    libraries = re.search(r"LIBRARIES=(.*)", ask("--dryrun", "-x", "cu", "-c", os.devnull))
    folders = [flag[2:] for flag in shlex.split(libraries[1] if libraries else "")]
    if not any((Path(folder) / "libcudart_static.a").exists() for folder in folders):
        raise NoCuda(f"nvcc {version} comes without libcudart_static.a")
    return Toolkit(nvcc, version, folders, architectures)
