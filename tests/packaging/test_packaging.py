"""The files of an installation and the effects of importing it.

Tests work on a copy of the sources, in processes that see that copy and the other installed
packages but not this checkout. They do not change the environment that runs the tests.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from support.installation import ROOT, environment, python

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("pip", "setuptools")),
    reason="pip and setuptools build the wheels of these tests",
)


def test_installs_one_top_level_name(unpacked: Path) -> None:
    names = {path.name for path in unpacked.iterdir() if path.suffix != ".dist-info"}
    assert names == {"fastclip"}


def test_wheel_holds_every_file_of_the_packages(unpacked: Path, sources: Path) -> None:
    kernels, emoji = sources / "triton_kernels", sources / "fastclip/demo/emoji"
    files = [p for p in (sources / "fastclip").rglob("*") if p.is_file()]
    code = [p for p in files if p.parent != emoji or p.suffix == ".py"]
    assert len(code) < len(files), "the demo's data is in the sources"
    code = [p for p in code if p.parent.name != "hub_kernel"]  # builds from a checkout only
    expected = {p.relative_to(sources) for p in code}
    expected |= {Path("fastclip") / p.relative_to(sources) for p in kernels.rglob("*.py")}
    expected |= {Path("fastclip/_C.absent")}  # the reason why there is no extension
    found = {p.relative_to(unpacked) for p in (unpacked / "fastclip").rglob("*") if p.is_file()}
    assert found == expected


def test_a_wheel_is_small_and_its_demo_names_the_missing_files(unpacked: Path) -> None:
    size = sum(p.stat().st_size for p in unpacked.rglob("*") if p.is_file())
    assert size < 3 << 19  # the demo's data has 6 MB
    pytest.importorskip("safetensors")
    pytest.importorskip("tokenizers")
    help_run = python(DEMO.format(["--help"]), unpacked)
    assert help_run.returncode == 0, help_run.stderr
    failed = python(DEMO.format(["--out", "demo"]), unpacked)
    assert failed.returncode == 2
    message = failed.stderr.strip().splitlines()[-1]
    assert "the demo needs concepts.json, tokenizer.json, google.png, twitter.png in " in message
    assert str(unpacked / "fastclip/demo/emoji") in message and "`make demo`" in message


DEMO = "from fastclip.train import main; main({})"


def test_wheel_holds_the_licence(unpacked: Path) -> None:
    (licence,) = unpacked.glob("*.dist-info/**/LICENSE")
    assert licence.read_text() == (ROOT / "LICENSE").read_text()
    (metadata,) = unpacked.glob("*.dist-info/METADATA")
    assert "Apache-2.0" in metadata.read_text()


def test_kernels_import_from_the_wheel(unpacked: Path) -> None:
    process = python("import fastclip.triton_kernels as k; print(k.__file__)", unpacked)
    assert process.returncode == 0, process.stderr
    assert Path(process.stdout.strip()) == unpacked / "fastclip/triton_kernels/__init__.py"


def test_kernels_refuse_the_name_of_tritons_package(unpacked: Path) -> None:
    process = python("import triton_kernels", unpacked, cwd=ROOT)
    assert process.returncode != 0
    assert "ImportError: fastclip's kernels are fastclip.triton_kernels" in process.stderr


def test_this_installation_offers_no_top_level_kernels(tmp_path: Path) -> None:
    code = "import importlib.util as u; s = u.find_spec('triton_kernels'); print(s and s.origin)"
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert not process.stdout.startswith(str(ROOT))


def test_importing_is_light(unpacked: Path) -> None:
    """Importing neither starts CUDA nor imports optional packages, except those torch imports."""
    code = """
import sys, torch
before = set(sys.modules)
import fastclip, fastclip.loss, fastclip.reference, fastclip.triton_kernels
heavy = {"triton", "matplotlib", "open_clip", "torchvision", "tokenizers", "PIL"}
print(sorted(heavy & (set(sys.modules) - before)), torch.cuda.is_initialized())
"""
    process = python(code, unpacked)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split("\n")[0] == "[] False"
