"""The source distribution and its wheel: files, metadata, and what a build without torch says."""

import email
import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest
import torch
from support.installation import BUILT_FROM, MADE_HERE, ROOT, environment

import fastclip

pytest.importorskip("setuptools")

NAME = f"fastclip_loss-{fastclip.__version__}"


def run_setup(folder: Path, *arguments: str, **variables: str) -> str:
    """Runs setup.py of a folder and returns its output."""
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", *arguments],
        cwd=folder, env=environment(**variables), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def unpacked_sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unpacked source distribution, made from a copy of the checkout."""
    folder = tmp_path_factory.mktemp("sdist")
    checkout = folder / "checkout"
    checkout.mkdir()
    for name in (*BUILT_FROM, *runpy.run_path(str(ROOT / "setup.py"))["DISTRIBUTED"]):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, checkout / name, ignore=MADE_HERE, symlinks=True)
        else:
            shutil.copy(ROOT / name, checkout)
    run_setup(checkout, "sdist", "--formats", "tar", "-d", "..", FASTCLIP_SKIP_EXTENSION="1")
    with tarfile.open(folder / f"{NAME}.tar") as archive:
        archive.extractall(folder, filter="data")
    return folder / NAME


def files_of(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git knows the files of the checkout")
def test_a_source_distribution_is_the_whole_checkout(unpacked_sdist: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    tracked = {name for name in listed if name and (ROOT / name).is_file()}
    made = {"PKG-INFO", "setup.cfg"}
    found = {name for name in files_of(unpacked_sdist) if ".egg-info/" not in name}
    assert found - made == tracked


def metadata(folder: Path) -> Message:
    return email.message_from_string((folder / "PKG-INFO").read_text())


def test_the_metadata_are_those_of_an_index(unpacked_sdist: Path) -> None:
    told = metadata(unpacked_sdist)
    assert told["Name"] == "fastclip-loss"  # another project has the name fastclip
    assert told["Version"] == fastclip.__version__
    assert "Apache-2.0" in (told["License-Expression"], told["License"])
    assert told["Description-Content-Type"] == "text/markdown"
    assert told.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    assert told["Requires-Python"] == ">=3.10" and "torch>=2.10" in told.get_all("Requires-Dist")
    classifiers = told.get_all("Classifier")
    assert len(classifiers) == len(set(classifiers))
    versions = [c for c in classifiers if re.fullmatch(r".*Python :: 3\.\d+", c)]
    assert [c.rpartition(".")[2] for c in versions] == ["10", "11", "12", "13"]


def test_the_wheel_of_a_source_distribution_is_that_of_the_checkout(
    unpacked_sdist: Path, unpacked: Path, tmp_path: Path
) -> None:
    run_setup(unpacked_sdist, "bdist_wheel", "-d", str(tmp_path), FASTCLIP_SKIP_EXTENSION="1")
    names = set(zipfile.ZipFile(tmp_path / f"{NAME}-py3-none-any.whl").namelist())
    assert names == files_of(unpacked)


def test_a_module_that_is_gone_is_not_installed(unpacked_sdist: Path) -> None:
    gone = unpacked_sdist / "build/lib/fastclip/gone.py"
    gone.parent.mkdir(parents=True, exist_ok=True)
    gone.touch()
    run_setup(unpacked_sdist, "build_py", "--build-lib", "build/lib", FASTCLIP_SKIP_EXTENSION="1")
    assert not gone.exists() and gone.with_name("contrast.py").exists()


def isolated(folder: Path) -> dict[str, str]:
    """Returns variables that hide the environment's packages, except setuptools, as pip's do when
    it isolates a build."""
    overlay = folder / "overlay"
    overlay.mkdir()
    for part in importlib.metadata.files("setuptools"):
        top = overlay / part.parts[0]
        if part.parts[0] != ".." and not top.is_symlink():
            top.symlink_to(Path(part.locate()).parents[len(part.parts) - 2])
    hidden = str(Path(torch.__file__).parents[1])
    (overlay / "sitecustomize.py").write_text(
        f"import sys\nsys.path = [path for path in sys.path if path != {hidden!r}]\n"
    )
    return {"PYTHONPATH": str(overlay), "PYTHONNOUSERSITE": "1"}


BUILD = "import runpy; runpy.run_path('setup.py', run_name='__main__')"


@pytest.mark.parametrize("has_torch", [True, False])
def test_an_isolated_build_takes_the_environments_torch(
    unpacked_sdist: Path, tmp_path: Path, has_torch: bool
) -> None:
    """The build stops at the next obstacle, the compiler; without a torch to take, at that."""
    hides = isolated(tmp_path)
    code = "import sys; sys.argv = ['setup.py', '-q', 'build_py', '--build-lib', sys.argv[1]]\n"
    code += "from importlib.util import find_spec; assert find_spec('torch') is None\n"
    code += BUILD if has_torch else f"sys.modules['torch'] = None; {BUILD}"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "lib")],
        cwd=unpacked_sdist, env=environment(CXX=os.devnull, **hides), capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    reason = (tmp_path / "lib/fastclip/_C.absent").read_text().strip()
    assert reason in done.stderr
    expected = "no working C++ compiler" if has_torch else "they need torch in the environment"
    assert reason.startswith(expected)
