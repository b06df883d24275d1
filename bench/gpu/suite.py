"""The command lines of the tests on the device, the most important files first.

`command("card")`, and so on, run pytest. With pytest-xdist several processes compile kernels at
once.
"""

from __future__ import annotations

import importlib.util
import os
import sys

from .process import ROOT


def _files(*patterns: str) -> tuple[str, ...]:
    """The test files that match the patterns, in order of the first pattern that matches."""
    found = [path for one in patterns for path in sorted(ROOT.glob(f"tests/**/test_{one}.py"))]
    return tuple(dict.fromkeys(str(path.relative_to(ROOT)) for path in found))


# Tests that need a card; then the losses' own tests, which compile thousands of small kernels.
GROUPS = {
    "card": _files("gpu", "gpu_large", "gpu_engine_*", "split_*", "errors"),
    "losses": _files(
        "determinism", "gradients_requested", "shapes", "parts_of_a_block", "kept_products",
        "blocks", "accuracy",
    ),
    "sanitizers": _files("gpu", "gpu_large", "gpu_engine_*"),
}  # fmt: skip
# With sanitizers a test may take half a minute; these tests are therefore a group of their own.
MARKS = {"card": "not minutes and not sanitizer", "losses": "not minutes and not sanitizer",
         "sanitizers": "sanitizer"}  # fmt: skip
PACKAGES = ("pytest", "numpy")
PROCESSES = 8
# Without PYTHONSAFEPATH, `-m` would put the root, and with it triton_kernels/, on sys.path.
ENVIRONMENT = {"FASTCLIP_TEST_DEVICE": "cuda", "PYTHONSAFEPATH": "1"}


def missing() -> str | None:
    """Names the packages that tests need and that are not installed; None if all are."""
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} not installed" if absent else None


def command(group: str, backwards: bool = False) -> list[str]:
    """The command that runs a group of tests; `backwards` starts with the last file, after a run
    that was cut before it."""
    run = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-rfE", "-p", "no:cacheprovider"]
    # A file that cannot be imported does not stop the others; a test that hangs prints its stack.
    run += ["--continue-on-collection-errors", "-o", "faulthandler_timeout=60"]
    run += ["-m", MARKS[group], *(["--maxfail=20"] if group == "losses" else [])]
    if group != "sanitizers" and importlib.util.find_spec("xdist"):
        run += ["-n", str(min(PROCESSES, os.cpu_count() or 1))]
    return [*run, *(GROUPS[group][::-1] if backwards else GROUPS[group])]
