"""Hosts: the libraries that fastclip is patched into, and the versions of them that it knows."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from types import ModuleType

from ..engine.warn_once import warn_once


def disabled() -> bool:
    """True with FASTCLIP_DISABLE=1: every host computes its own losses.

    Raises:
        ValueError: another value than 0, 1 or none.
    """
    value = os.environ.get("FASTCLIP_DISABLE") or "0"
    if value not in ("0", "1"):
        raise ValueError(f"FASTCLIP_DISABLE must be 0 or 1, got {value!r}")
    return value == "1"


@dataclass(frozen=True)
class Host:
    """A library that computes contrastive losses itself.

    package: the name of its top module. versions: those that the integration has been tested with;
    "3.3" stands for 3.3.0, 3.3.1, ...
    """

    package: str
    versions: tuple[str, ...]

    def knows(self, version: str) -> bool:
        """True if the integration has been tested with this version."""
        return any(f"{version}.".startswith(f"{known}.") for known in self.versions)

    def load(self) -> ModuleType:
        """Imports the host and returns it.

        Raises:
            ImportError: the host is not installed, or is of a version that is not known.
        """
        try:
            module = importlib.import_module(self.package)
        except ModuleNotFoundError as error:
            if error.name != self.package:
                raise
            raise ImportError(
                f"fastclip.integrations needs {self.package}, which is not installed"
            ) from None
        found = str(getattr(module, "__version__", "unknown"))
        if not self.knows(found):
            raise ImportError(
                f"fastclip.integrations knows {self.package} {', '.join(self.versions)}, got "
                f"{found}: FASTCLIP_DISABLE=1 leaves it as it is"
            )
        return module

    def falls_back(self, reason: str) -> None:
        """Warns once that the host's own code serves a call, and why."""
        warn_once(
            f"{self.package}: {reason}",
            f"{self.package}'s own code computes this loss, not fastclip: {reason}",
        )
