"""Imports open_clip where torchvision's compiled operators do not load; skips where it is absent.

A torchvision built for CUDA cannot load its library beside a CPU build of torch, and then fails on
import: it describes operators (`torchvision::nms`, ...) that nobody declared. open_clip needs only
its Python side, so the missing operators are declared, without an implementation: calling one is
still an error. This file never touches an installation that imports as it is.
"""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

_declared: list[torch.library.Library] = []  # a collected Library takes its declarations along


def import_open_clip() -> ModuleType:
    """The `open_clip` module, or a skip that names the missing package."""
    for package in ("open_clip", "torchvision", "timm"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        _declare_operators()
    import open_clip

    return open_clip


def _declare_operators() -> None:
    """Declares every operator that torchvision gives a meta implementation to, and forgets its
    half-finished import so that the next one starts afresh."""
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    package = Path(importlib.util.find_spec("torchvision").origin).parent
    source = (package / "_meta_registrations.py").read_text()
    names = re.findall(r'(?:"torchvision::|register_meta\(")(\w+)"', source)
    library = torch.library.Library("torchvision", "DEF")
    for name in sorted(set(names)):
        library.define(f"{name}(Tensor input) -> Tensor")
    _declared.append(library)
