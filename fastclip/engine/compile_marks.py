"""Marks for torch.compile that do not import the compiler, which takes seconds."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Marked = TypeVar("Marked", bound=Callable[..., Any])


def constant_in_graphs(function: Marked) -> Marked:
    """Does the same as `torch.compiler.assume_constant_result`: a graph calls the function once,
    while it is made, and keeps the result."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def no_compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """Does the same as `torch.compiler.disable`: graphs break before and after the function. Until
    other code has imported the compiler there is nothing to disable, and it is called directly.

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
