"""`no_compile` excludes a function from torch.compile: graphs break before and after it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch


def no_compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compiler.disable`, which imports the compiler only once something else has.

    It serves calls whose sizes come from other ranks, and arguments that no operator can take.
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
