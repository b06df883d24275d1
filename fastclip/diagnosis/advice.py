"""Advice for what a report has found."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from ..engine.backends import AVAILABLE

OWN = "fastclip-loss"
BUILD = "pip install --force-reinstall --no-deps --no-cache-dir --no-build-isolation"


def lines(found: dict[str, Any]) -> list[str]:
    """Returns a sentence with a command for each thing that should be different."""
    told = []
    engines = found["engines"]
    if engines["cpu"] != AVAILABLE:
        told.append(
            "Tensors on CPUs take the plain PyTorch engine, which is slower and needs more memory. "
            "With torch and a C++20 compiler installed, this command builds the compiled module "
            f"for this torch; SOURCES is a checkout or fastclip_loss-*.tar.gz: {BUILD} SOURCES"
        )
    if found["gpus"]["devices"] and AVAILABLE not in (engines["cuda"], engines["triton"]):
        told.append(
            "Tensors on CUDA devices take the plain PyTorch engine. pip install 'triton>=3.6' adds "
            "the Triton engine to devices of compute capability 8.0 and later."
        )
    told += [
        f"fastclip.integrations knows {package} {', '.join(host['versions'])} and leaves "
        f"{host['version']} as it is: install a version that is known."
        for package, host in found["hosts"].items()
        if not host["known"]
    ]
    others = set(importlib.metadata.packages_distributions().get("fastclip", ())) - {OWN}
    told += [
        f"The distribution {name!r} installs a module fastclip, too, and either may have "
        f"overwritten the other's files: pip uninstall {name} {OWN}, then install {OWN} again."
        for name in sorted(others)
    ]
    return told
