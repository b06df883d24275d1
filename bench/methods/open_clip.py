"""Imports open_clip's losses, even if torchvision's compiled operators do not load.

A torchvision built for CUDA fails to import beside a CPU build of torch: it registers meta
implementations of operators (`torchvision::nms`, ...) that are not declared. open_clip calls none
of them, so declarations without an implementation suffice; calling one is still an error. An
installation that imports without this stays untouched, and nothing is installed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def import_module(name: str, needs: tuple[str, ...] = ("open_clip", "torchvision")) -> ModuleType:
    """Imports `open_clip` or a module of it, or another package that imports torchvision.

    Raises:
        ModuleNotFoundError: "<package> is not installed", for the first missing one of `needs`.
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


def distillation(loss: Any) -> Callable[..., Tensor]:
    """The distillation part of open_clip's `DistillClipLoss`, without its contrastive part."""

    def distilled(x: Tensor, y: Tensor, scale: Tensor, *teacher: Tensor) -> Tensor:
        logits, targets = loss.get_logits(x, y, scale), loss.get_logits(*teacher)
        both = (loss.dist_loss(t, s) for t, s in zip(targets, logits, strict=True))
        return sum(both) / 2

    return distilled


def _declare_operators() -> None:
    """Declares the operators that torchvision gives meta implementations, and removes its partial
    import from `sys.modules` so that the next import starts afresh."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    package = Path(importlib.util.find_spec("torchvision").origin).parent
    source = (package / "_meta_registrations.py").read_text()
    for name in sorted(set(re.findall(r'(?:"torchvision::|register_meta\(")(\w+)"', source))):
        _library().define(f"{name}(Tensor input) -> Tensor")


@functools.cache  # the declarations last only as long as the library object
def _library() -> torch.library.Library:
    return torch.library.Library("torchvision", "FRAGMENT")
