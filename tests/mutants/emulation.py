"""The build of the emulated CUDA engine, before the tests load it: a failure is not a kill."""

import os
import subprocess
import sys
from pathlib import Path

from mutants.trial import DoesNotBuild

BUILD = "from support import cuda_case; cuda_case.build()"


def make(tree: Path, changed: str | None) -> None:
    """Builds the library; `support.cuda_case` keeps the libraries of unchanged sources."""
    environment = {
        **os.environ, "PYTHONPATH": f"{tree}:{tree / 'tests'}", "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", BUILD], cwd=tree, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise DoesNotBuild(done.stderr[-2000:])
