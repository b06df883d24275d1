"""open_clip's losses where they import: also beside a torchvision whose compiled operators do not.

A torchvision built for CUDA beside a CPU build of torch fails on import: it describes operators
(`torchvision::nms`, ...) that nobody declared. open_clip calls none of them, so a declaration
without an implementation will do; calling one is still an error. This file never touches an
installation that imports as it is, and installs nothing.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import torch


def import_module(name: str, needs: tuple[str, ...] = ("open_clip", "torchvision")) -> ModuleType:
    """`open_clip` or a module of it.

    Raises:
        ModuleNotFoundError: "<package> is not installed", for the first of `needs` that is not.
    """
    for package in needs:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"{package} is not installed", name=package)
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        _declare_operators()
    return importlib.import_module(name)


def _declare_operators() -> None:
    """Declares every operator that torchvision gives a meta implementation to, and forgets its
    half-finished import so that the next one starts afresh."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    package = Path(importlib.util.find_spec("torchvision").origin).parent
    source = (package / "_meta_registrations.py").read_text()
    for name in sorted(set(re.findall(r'(?:"torchvision::|register_meta\(")(\w+)"', source))):
        _library().define(f"{name}(Tensor input) -> Tensor")


@functools.cache  # a library that is collected takes its declarations along
def _library() -> torch.library.Library:
    return torch.library.Library("torchvision", "FRAGMENT")
