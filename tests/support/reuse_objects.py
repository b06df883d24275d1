"""A C++ compiler that copies objects of a checkout's last build if the sources have not
changed since, and compiles otherwise. It saves minutes.

    python reuse_objects.py CHECKOUT COMPILER ARGUMENTS...
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path


def built_object(checkout: Path, out: Path) -> Path | None:
    """Returns the object of the checkout that equals `out`; None if there is none or it is old."""
    names = [k for k, part in enumerate(out.parts) if part.startswith("objects-")]
    built = checkout.joinpath("build", *out.parts[names[0] :]) if names else out
    # The library is the last product of an editable build: every object is then up to date.
    library = f"fastclip/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    linked = max((path.stat().st_mtime for path in checkout.glob(library)), default=0)
    newest = max(p.stat().st_mtime for p in (checkout / "csrc").rglob("*") if p.is_file())
    return built if built.is_file() and linked > newest else None


def main(checkout: str, *command: str) -> None:
    if "-c" in command:
        out = Path(command[command.index("-o") + 1])
        if built := built_object(Path(checkout), out):
            shutil.copy(built, out)
            return
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
