"""Builds the kernel repository: `python -m fastclip.hub_kernel FOLDER`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .layout import build


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastclip.hub_kernel", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", default="fastclip-loss", help="of the kernel (fastclip-loss)")
    parser.add_argument("--version", type=int, default=1, help="the kernel's major version (1)")
    parser.add_argument("--owner", default="", help="the Hub's user or organisation, for the card")
    options = parser.parse_args()
    try:
        build(options.folder, options.name, options.version, options.owner)
    except ValueError as error:
        parser.error(str(error))
    print(f"{options.folder}: a repository for kernels.get_local_kernel; nothing is uploaded")


if __name__ == "__main__":
    sys.exit(main())
