"""Collects what `python -m fastclip` prints, as a dictionary of plain values."""

from __future__ import annotations

from typing import Any

from ..engine import backends
from . import advice, engines, hosts, machine, self_check, settings


def diagnose(check: bool = True) -> dict[str, Any]:
    """Returns versions, machine, engines, variables, hosts and advice.

    With `check` every engine that can run computes losses and gradients: "checks" has its errors
    and times, and "wrong" a line for each engine that is wrong.
    """
    checks = self_check.run() if check else []
    found = {
        "versions": machine.versions(),
        "system": machine.system(),
        "cpu": machine.cpu(),
        "gpus": machine.gpus(),
        "module": backends.build_info(),
        "engines": backends.backends(),
        "defaults": engines.defaults(),
        "variables": settings.variables(),
        "hosts": hosts.installed(),
        "checks": [row._asdict() for row in checks],
        "wrong": [row.problem for row in checks if row.problem],
    }
    return found | {"advice": advice.lines(found)}
