"""Calls a function as soon as a module has been imported."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_waiting: dict[str, Callable[[], None]] = {}


def on_import(name: str, call: Callable[[], None]) -> None:
    """Calls a function after the first import of a module: now if it has been imported already.

    A module has one function. The module's import raises what the function raises.
    """
    if name in sys.modules:
        call()
        return
    _waiting[name] = call
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


def forget(name: str) -> None:
    """Takes back `on_import`, unless the module has been imported since."""
    _waiting.pop(name, None)


class _Finder:
    """Asks the other finders for the modules that are waited for."""

    def __init__(self) -> None:
        self.asking: set[str] = set()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        # A search need not lead to an import, so the function goes on waiting.
        if name not in _waiting or name in self.asking:
            return None
        self.asking.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.asking.remove(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Loads a module as its own loader does, which other modules may share."""

    def __init__(self, own: Loader) -> None:
        self.own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        module.__spec__.loader = module.__loader__ = self.own
        self.own.exec_module(module)
        if call := _waiting.pop(name, None):
            call()

    def __getattr__(self, name: str) -> Any:
        """Serves callers that ask a spec for its source, or for more, and do not load it."""
        return getattr(self.own, name)


_FINDER = _Finder()
