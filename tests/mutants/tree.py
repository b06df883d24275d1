"""Copies of the checkout, in which mutants are tried: the working tree itself never changes."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = f"fastclip/_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def copy_of_checkout(folder: Path) -> None:
    """Copies the files that git tracks or would track, and the built extension."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    for name in [*listed, LIBRARY]:
        source, target = ROOT / name, folder / name
        if name and source.is_file() and not source.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    # An installation gives triton_kernels/ this name (setup.py).
    os.symlink("../triton_kernels", folder / "fastclip/triton_kernels")
