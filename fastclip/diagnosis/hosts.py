"""The hosts of `fastclip.integrations` that are installed. None is imported."""

from __future__ import annotations

import importlib
import importlib.metadata

from .. import integrations
from ..integrations.host import Host
from .machine import version_of


def known_hosts() -> list[Host]:
    """Returns the host of every integration."""
    names = integrations.HOSTS.values()
    return [importlib.import_module(f"{integrations.__name__}.{name}").HOST for name in names]


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
