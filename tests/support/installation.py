"""Builds and uses installations of fastclip apart from the one under test."""

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


MADE_HERE = shutil.ignore_patterns("_C.*", "__pycache__")


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
    """This process's variables without those that would steer a build or an import."""
    steering = {"CXX", "PYTHONPATH", "PYTHONSAFEPATH"}
    steering |= {"FASTCLIP_REQUIRE_EXTENSION", "FASTCLIP_SKIP_EXTENSION"}
    steering |= {"FASTCLIP_CUDA", "TORCH_CUDA_ARCH_LIST", "CUTLASS_PATH"}
    return {k: v for k, v in os.environ.items() if k not in steering} | variables


def pip(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, env=environment(**variables), capture_output=True, text=True)


def python(code: str, package: Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs code that finds `package`'s folder first. -S leaves out the .pth files, through which an
    editable installation would offer the checkout's `_C` to any package named fastclip."""
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
    process = python(USE_THE_LOSS, package)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)
