"""Prints what an issue report needs: `python -m fastclip --help`."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence

from . import diagnosis
from .diagnosis import report


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the diagnosis; returns 1 if an engine computes a wrong loss, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m fastclip",
        description="Prints which engines can run here and why the others cannot, the versions and "
        "settings that matter, and a check of every engine against float64, with times. Ends with "
        "status 1 if an engine is wrong. Paste it into an issue report.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--no-check", action="store_true", help="leave out the check and its times")
    options = parser.parse_args(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the diagnosis says the same
        found = diagnosis.diagnose(check=not options.no_check)
    print(json.dumps(found, indent=2) if options.json else report.text(found))
    return int(bool(found["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
