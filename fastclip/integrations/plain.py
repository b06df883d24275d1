"""Tells whether a part of a host's loss is the host's own, not one that a caller has put there."""

from __future__ import annotations

from typing import Any

from torch import nn


def is_plain(found: Any, plain: nn.Module) -> bool:
    """True if a module has the type and the settings of `plain`; its mode does not count."""
    return type(found) is type(plain) and _settings(found) == _settings(plain)


def _settings(module: nn.Module) -> dict[str, Any]:
    own = {name: value for name, value in vars(module).items() if name[:1] != "_"}
    return {**own, **module._buffers, "training": None}
