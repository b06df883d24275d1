"""Subclasses of a host's classes that are made when first used, and take the place of these."""

from __future__ import annotations

import importlib
from typing import Any

from .host import Host, disabled
from .replacements import Replacements


class Subclasses:
    """The classes `names` of a module, each a subclass of the host's class that it stands for.

    The module is imported, and the host with it, when a class is first asked for: a class needs
    its base. Its identity is stable and it is pickled by its name, as any class of a module.
    """

    def __init__(self, host: Host, theirs: str, module: str, names: tuple[str, ...]) -> None:
        """theirs: the host's module with its classes of these names."""
        self.host, self.theirs, self.module, self.names = host, theirs, module, names
        self._made = Replacements()

    def get(self, name: str) -> Any:
        """The class of that name: the `__getattr__` of the package that offers it. With
        FASTCLIP_DISABLE=1 it is the host's own, of any version."""
        if name not in self.names:
            package = self.module.rpartition(".")[0]
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if disabled():
            return getattr(importlib.import_module(self.theirs), name)
        self.host.load()
        return getattr(importlib.import_module(self.module), name)

    def patch(self) -> None:
        """Puts the classes in the place of the host's, under each name in an imported module.

        Classes of the host that inherit from these inherit from ours. Objects that exist, and
        subclasses of others, stay as they are. A second call, and any call with
        FASTCLIP_DISABLE=1, does nothing.

        Raises:
            ImportError: the host is not installed, or its version is not known.
        """
        if self._made or disabled():
            return
        ours = {cls.__bases__[0]: cls for cls in map(self.get, self.names)}
        for theirs, cls in ours.items():
            self._made.replace_everywhere(theirs, cls)
            for heir in theirs.__subclasses__():
                if self._of_host(heir.__module__):
                    bases = tuple(cls if base is theirs else base for base in heir.__bases__)
                    self._made.replace(heir, "__bases__", bases)

    def unpatch(self) -> None:
        """Puts the host's classes back. Without a patch it does nothing."""
        self._made.restore()

    def _of_host(self, module: str) -> bool:
        return f"{module}.".startswith(f"{self.host.package}.")
