"""Warnings that a process gives once, at the line that called the library."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

_given: set[str] = set()
_INSIDE = tuple(str(Path(file).parent) + os.sep for file in (Path(__file__).parent, torch.__file__))


def warn_once(about: str, message: str) -> None:
    """Warns, unless this process has warned about it before."""
    if about not in _given:
        _given.add(about)
        warnings.warn(message, stacklevel=_depth())


def _depth() -> int:
    """The stacklevel of the first caller outside this library and torch, for `warn_once`."""
    frame, depth = sys._getframe(2), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, depth = frame.f_back, depth + 1
    return depth
