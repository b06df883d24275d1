"""Runs a script with the contrastive losses of its libraries replaced by fastclip's.

    python -m fastclip.patch open_clip_train.main ARGS
    python -m fastclip.patch train.py ARGS
    torchrun --nproc-per-node 8 -m fastclip.patch open_clip_train.main ARGS

Each library that fastclip knows is patched when the script imports it; `--host NAME`, which may be
repeated, patches that library alone. Processes that the script itself starts are not patched,
unless they are forked: such a script calls `fastclip.integrations.NAME.patch()`. With
FASTCLIP_DISABLE=1 the script runs as it is.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import runpy
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from .integrations import HOSTS
from .integrations.host import disabled


class Patcher:
    """A finder of modules that patches hosts as soon as they are imported."""

    def __init__(self, hosts: Iterable[str]) -> None:
        self.waiting = set(hosts)
        self.patched: list[str] = []

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Called by the import system, before its other finders."""
        if name not in self.waiting:
            return None
        self.waiting.remove(name)  # the other finders are asked now
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            self.waiting.add(name)
            return None
        spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(Loader):
    """Loads a host as its own loader does, which other modules may share, and patches it."""

    def __init__(self, own: Loader, patcher: Patcher) -> None:
        self.own = own
        self.patcher = patcher

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        module.__spec__.loader = module.__loader__ = self.own
        self.own.exec_module(module)
        try:
            importlib.import_module(f"fastclip.integrations.{name}").patch()
        except ImportError as error:
            # The script may catch an ImportError, and would run unpatched.
            sys.exit(f"fastclip.patch: {error}; --host NAME patches that library alone")
        self.patcher.patched.append(name)
        _say(f"{name} computes its losses with fastclip")


def _say(text: str) -> None:
    """Prints a line once in a job: under torchrun from the first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(f"fastclip.patch: {text}", file=sys.stderr, flush=True)


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    usage = "python -m fastclip.patch [--host NAME] SCRIPT.py|MODULE [ARGS ...]"
    parser = argparse.ArgumentParser(
        "python -m fastclip.patch", usage, description=__doc__.partition("\n")[0],
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--host", action="append", choices=HOSTS, help="patch this library alone")
    parser.add_argument("script", metavar="SCRIPT.py|MODULE")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    given = _parsed(arguments)
    sys.argv = [given.script, *given.arguments]
    patcher = None
    if disabled():
        _say("FASTCLIP_DISABLE=1, so nothing is patched")
    else:
        patcher = Patcher(given.host or HOSTS)
        sys.meta_path.insert(0, patcher)
    if given.script.endswith(".py"):
        if not getattr(sys.flags, "safe_path", False):
            # As Python does, which has put the working directory there for `-m`.
            sys.path[0] = os.path.dirname(os.path.abspath(given.script))
        runpy.run_path(given.script, run_name="__main__")
    else:
        runpy.run_module(given.script, run_name="__main__", alter_sys=True)
    if patcher is not None and not patcher.patched:
        _say(
            f"nothing was patched: {given.script} imported none of {', '.join(given.host or HOSTS)}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
