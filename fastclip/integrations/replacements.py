"""Attributes of a host that are replaced, and put back."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

_ABSENT = object()


class Replacements:
    """Attributes of modules and classes, `__bases__` included, that have new values until
    `restore`."""

    def __init__(self) -> None:
        self._made: list[tuple[Any, str, Any, Any]] = []
        self._everywhere: list[tuple[Any, Any]] = []

    def __bool__(self) -> bool:
        return bool(self._made)

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute. A class keeps a static or class method as such."""
        before = _held(owner, name)
        self._made.append((owner, name, before, value))
        setattr(owner, name, value)

    def replace_everywhere(self, before: Any, value: Any) -> None:
        """Replaces an object under each name that it has in an imported module, except fastclip's.

        A script may have imported a host's class by name already: that name would stay the host's,
        and nothing would say so.
        """
        self._everywhere.append((before, value))
        for module, name in _names_of(before):
            self.replace(module, name, value)

    def restore(self) -> None:
        """Sets the attributes to what they were, except those that someone else has set since.
        Names that modules have imported since are set, too."""
        while self._made:
            owner, name, before, value = self._made.pop()
            if _held(owner, name) is not value:
                continue
            if before is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        while self._everywhere:
            before, value = self._everywhere.pop()
            for module, name in _names_of(value):
                setattr(module, name, before)


def _names_of(value: Any) -> list[tuple[ModuleType, str]]:
    """The modules, except fastclip's, that hold an object, and its names there."""
    return [
        (module, name)
        for imported, module in list(sys.modules.items())
        if isinstance(module, ModuleType) and imported.partition(".")[0] != "fastclip"
        for name, found in list(vars(module).items())
        if found is value
    ]


def _held(owner: Any, name: str) -> Any:
    """The owner's own attribute, not one that it inherits."""
    return owner.__bases__ if name == "__bases__" else vars(owner).get(name, _ABSENT)
