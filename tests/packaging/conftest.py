"""A copy of the sources and an unpacked wheel of them, once for each test file."""

import shutil
import zipfile
from pathlib import Path

import pytest
from support.installation import BUILT_FROM, MADE_HERE, ROOT, SOURCE_FOLDERS, pip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that a build reads."""
    folder = tmp_path_factory.mktemp("sources")
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, folder)
    for name in SOURCE_FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=MADE_HERE)
    return folder


@pytest.fixture(scope="module")
def unpacked(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unpacked wheel without the compiled module: the Python files of every wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    built = pip(
        "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(sources),
        FASTCLIP_SKIP_EXTENSION="1",
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = folder.glob("fastclip_loss-*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "unpacked")
    return folder / "unpacked"
