"""The versions of what fastclip runs on, and the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from contextlib import suppress
from pathlib import Path

import torch

from .. import __version__

# Flags of /proc/cpuinfo that the CPU engine and torch's products use.
FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16",
         "amx_tile", "amx_bf16")  # fmt: skip


def version_of(distribution: str) -> str | None:
    """The version of an installed distribution, which is not imported."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(distribution)
    return None


def versions() -> dict[str, str | None]:
    return {
        "fastclip": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "cuda": torch.version.cuda,
        "numpy": version_of("numpy"),
    }


def system() -> dict[str, str]:
    name, version = platform.libc_ver()
    return {
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libc": f"{name} {version}".strip(),
        "package": str(Path(__file__).parents[1]),
    }


def _read(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text()
    return ""


def cpu() -> dict[str, object]:
    told = _read("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.*)$", told, re.MULTILINE)
    flags = re.search(r"^flags\s*: (.*)$", told, re.MULTILINE)
    has = set(flags[1].split()) if flags else set()
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    return {
        "model": model[1] if model else platform.processor() or platform.machine(),
        "flags": [flag for flag in FLAGS if flag in has],
        "cores": len(usable) or os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
    }


def gpus() -> dict[str, object]:
    """The driver, and the CUDA devices that torch sees."""
    driver = re.search(
        r"Kernel Module.*?(\d+\.\d+(?:\.\d+)?)", _read("/proc/driver/nvidia/version")
    )
    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            told = torch.cuda.get_device_properties(index)
            devices.append(
                f"{told.name}, sm_{told.major}{told.minor}, {told.total_memory >> 20} MiB"
            )
    return {"driver": driver[1] if driver else None, "devices": devices}
