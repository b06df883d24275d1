"""The hosts of `fastclip.integrations` that are installed. None is imported."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil

from .. import integrations
from ..integrations.host import Host
from .machine import version_of


def known_hosts() -> list[Host]:
    """Returns the host of every integration."""
    names = [found.name for found in pkgutil.iter_modules(integrations.__path__)]
    modules = [importlib.import_module(f"{integrations.__name__}.{name}") for name in names]
    return [module.HOST for module in modules if isinstance(getattr(module, "HOST", None), Host)]


def installed() -> dict[str, dict[str, object]]:
    """Returns the version of every installed host, whether it is known, and the known ones."""
    owners = importlib.metadata.packages_distributions()
    found = {}
    for host in known_hosts():
        for distribution in owners.get(host.package, ())[:1]:
            version = version_of(distribution) or "unknown"
            found[host.package] = {
                "version": version, "known": host.knows(version), "versions": list(host.versions),
            }  # fmt: skip
    return found
