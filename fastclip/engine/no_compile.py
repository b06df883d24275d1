"""Functions that are no part of a compiled graph: it is cut there."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch


def no_compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compiler.disable`, without importing the compiler before somebody compiles.

    For calls whose sizes other ranks tell, and for arguments that no operator takes.
    """
    disabled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    return run
