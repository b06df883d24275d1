"""Builds and runs installations of fastclip other than the one under test."""

import json
import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

BUILT_FROM = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
SOURCE_FOLDERS = ("csrc", "fastclip", "triton_kernels")
MADE_HERE = shutil.ignore_patterns("_C*.so", "__pycache__")


USE_THE_LOSS = """
import json, warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastclip.loss, fastclip.reference
    x, y = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    losses = [float(fastclip.loss.clip_loss(x, y, 2.0)) for _ in range(2)]
print(json.dumps({
    "warnings": [str(entry.message) for entry in caught if "fastclip" in str(entry.message)],
    "losses": losses,
    "truth": float(fastclip.reference.clip_loss(x, y, 2.0)),
    "cpu": fastclip.backends()["cpu"],
}))
"""


def environment(**variables: str) -> dict[str, str]:
    """This process's variables without those that affect a build or an import."""
    affecting = {"CXX", "PYTHONPATH", "PYTHONSAFEPATH"}
    affecting |= {"FASTCLIP_REQUIRE_EXTENSION", "FASTCLIP_SKIP_EXTENSION"}
    affecting |= {"FASTCLIP_CUDA", "TORCH_CUDA_ARCH_LIST", "CUTLASS_PATH"}
    return {k: v for k, v in os.environ.items() if k not in affecting} | variables


def pip(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs pip in a process with these environment variables."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, env=environment(**variables), capture_output=True, text=True)


def python(code: str, package: Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs code with the folder `package` first on the path. -S skips the .pth files, by which an
    editable installation would give the checkout's `_C` to any package named fastclip."""
    installed = [*site.getsitepackages(), site.getusersitepackages()]
    path = os.pathsep.join([str(package), *installed])
    return subprocess.run(
        [sys.executable, "-S", "-c", code],
        env=environment(PYTHONPATH=path, OMP_NUM_THREADS="1"),
        cwd=cwd or package,
        capture_output=True,
        text=True,
    )


def use_the_loss(package: Path) -> dict:
    """Returns the warnings, losses and CPU availability of an installation."""
    process = python(USE_THE_LOSS, package)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)
