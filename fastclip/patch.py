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
import functools
import importlib
import os
import runpy
import sys
from collections.abc import Sequence

from .integrations import HOSTS
from .integrations.host import disabled
from .integrations.on_import import on_import


def _say(text: str) -> None:
    """Prints a line once in a job: under torchrun from the first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(f"fastclip.patch: {text}", file=sys.stderr, flush=True)


def _patch(host: str, met: list[str]) -> None:
    """Adds a host that has been imported to a list, and patches it."""
    met.append(host)
    try:
        importlib.import_module(f"fastclip.integrations.{HOSTS[host]}").patch()
    except ImportError as error:
        # The script may catch an ImportError, and would run unpatched.
        sys.exit(f"fastclip.patch: {error}; --host NAME patches that library alone")
    _say(f"{host} computes its losses with fastclip")


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
    try:
        asked = not disabled()
    except ValueError as error:
        sys.exit(f"fastclip.patch: {error}")
    sys.argv = [given.script, *given.arguments]
    hosts, met = given.host or list(HOSTS), []
    if asked:
        for host in hosts:
            on_import(host, functools.partial(_patch, host, met))
    else:
        _say("FASTCLIP_DISABLE=1, so nothing is patched")
    try:
        _run(given.script)
    finally:  # scripts end with sys.exit
        if asked and not met:
            _say(f"nothing was patched: {given.script} imported none of {', '.join(hosts)}")


def _run(script: str) -> None:
    """Runs a file or a module as Python does."""
    if script.endswith(".py") or os.path.isfile(script):
        if not getattr(sys.flags, "safe_path", False):
            # Python has put the working directory there for `-m`.
            sys.path[0] = os.path.dirname(os.path.realpath(script))
        runpy.run_path(os.path.abspath(script), run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
