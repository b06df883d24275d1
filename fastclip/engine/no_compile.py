"""`no_compile` excludes a function from torch.compile: graphs break before and after it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch


def no_compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """Does the same as `torch.compiler.disable`, but does not import the compiler: it disables
    nothing until some other code has imported it.

    This is for calls whose sizes come from other ranks, or whose arguments no operator can take.
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
