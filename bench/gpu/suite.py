"""The tests on the device, in an order that shows first what must be seen first.

`suite("card")`, and so on, are pytest's command lines. With pytest-xdist several processes compile
kernels at once.
"""

from __future__ import annotations

import importlib.util
import os
import sys

from .process import ROOT


def _files(*patterns: str) -> tuple[str, ...]:
    """Files of tests by pattern, each where it is named first."""
    found = [path for one in patterns for path in sorted(ROOT.glob(f"tests/**/test_{one}.py"))]
    return tuple(dict.fromkeys(str(path.relative_to(ROOT)) for path in found))


# What only a card can show; then the losses' own tests, thousands of small kernels to compile.
GROUPS = {
    "card": _files("gpu", "gpu_large", "gpu_engine_*", "split_products", "errors"),
    "losses": _files(
        "determinism", "gradients_requested", "shapes", "parts_of_a_block", "kept_products",
        "blocks", "accuracy",
    ),
    "sanitizers": _files("gpu", "gpu_large", "gpu_engine_*"),
}  # fmt: skip
# Sanitizers may take half a minute for a test: they are a group of their own.
MARKS = {"card": "not minutes and not sanitizer", "losses": "not minutes and not sanitizer",
         "sanitizers": "sanitizer"}  # fmt: skip
PACKAGES = ("pytest", "numpy")
PROCESSES = 8
# Safe path: `-m` would else put the root, and with it triton_kernels/, on sys.path.
ENVIRONMENT = {"FASTCLIP_TEST_DEVICE": "cuda", "PYTHONSAFEPATH": "1"}


def missing() -> str | None:
    """The packages that tests need and that are not installed."""
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} not installed" if absent else None


def command(group: str, backwards: bool = False) -> list[str]:
    """`backwards`: the last file first, after a run that was cut before it."""
    line = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-rfE", "-p", "no:cacheprovider"]
    # A file that cannot be imported costs itself alone; a test that hangs says where.
    line += ["--continue-on-collection-errors", "-o", "faulthandler_timeout=60"]
    line += ["-m", MARKS[group], *(["--maxfail=20"] if group == "losses" else [])]
    if group != "sanitizers" and importlib.util.find_spec("xdist"):
        line += ["-n", str(min(PROCESSES, os.cpu_count() or 1))]
    return [*line, *(GROUPS[group][::-1] if backwards else GROUPS[group])]
