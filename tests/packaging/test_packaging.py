"""What an installation holds, and what importing it does and does not do.

Everything runs on a copy of the sources and in other processes, which see that copy and the other
installed packages but not this checkout. Nothing here touches the environment that runs the tests.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BUILT_FROM = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
SOURCE_FOLDERS = ("csrc", "fastclip", "triton_kernels")
MADE_HERE = shutil.ignore_patterns("_C.*", "__pycache__")

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("pip", "setuptools")),
    reason="pip and setuptools build the wheels of these tests",
)

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


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads."""
    folder = tmp_path_factory.mktemp("sources")
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, folder)
    for name in SOURCE_FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=MADE_HERE)
    return folder


@pytest.fixture(scope="module")
def unpacked(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel without the extension, unpacked; what is in it is Python's part of every wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    built = pip(
        "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(sources),
        FASTCLIP_SKIP_EXTENSION="1",
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = folder.glob("fastclip-*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "unpacked")
    return folder / "unpacked"


def test_installs_one_top_level_name(unpacked: Path) -> None:
    names = {path.name for path in unpacked.iterdir() if path.suffix != ".dist-info"}
    assert names == {"fastclip"}


def test_wheel_holds_every_file_of_the_packages(unpacked: Path, sources: Path) -> None:
    kernels = sources / "triton_kernels"
    expected = {p.relative_to(sources) for p in (sources / "fastclip").rglob("*") if p.is_file()}
    expected |= {Path("fastclip") / p.relative_to(sources) for p in kernels.rglob("*.py")}
    found = {p.relative_to(unpacked) for p in (unpacked / "fastclip").rglob("*") if p.is_file()}
    assert found == expected


def test_wheel_carries_the_licence(unpacked: Path) -> None:
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
    """No CUDA, and none of the optional packages; what torch imports by itself does not count."""
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


def test_absent_extension_is_told_once_and_replaced(unpacked: Path) -> None:
    result = use_the_loss(unpacked)
    assert len(result["warnings"]) == 1
    assert result["cpu"] != "available"
    assert result["losses"] == pytest.approx([result["truth"]] * 2, rel=1e-5)


def test_extension_that_is_no_library_is_told_once_and_replaced(
    unpacked: Path, tmp_path: Path
) -> None:
    shutil.copytree(unpacked, tmp_path, dirs_exist_ok=True)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    (tmp_path / f"fastclip/_C{suffix}").write_bytes(b"not a library")
    result = use_the_loss(tmp_path)
    assert len(result["warnings"]) == 1
    assert torch.__version__ in result["warnings"][0]
    assert result["cpu"] != "available"
    assert result["losses"] == pytest.approx([result["truth"]] * 2, rel=1e-5)


def compiled_library() -> Path:
    """The installed extension, which has to be there where the run requires it."""
    spec = importlib.util.find_spec("fastclip._C")
    if spec is None or spec.origin is None:
        assert os.environ.get("FASTCLIP_REQUIRE_EXTENSION") != "1", "fastclip._C is not installed"
        pytest.skip("fastclip is installed without its extension")
    return Path(spec.origin)


def test_extension_of_another_torch_is_told_with_both_versions(
    unpacked: Path, tmp_path: Path
) -> None:
    """The real library, made to ask torch for a symbol that it does not have, as one that was built
    against another version does."""
    library = compiled_library()
    shutil.copytree(unpacked, tmp_path, dirs_exist_ok=True)
    ours, other = torch.__version__.encode(), b"1.99" + b"9" * (len(torch.__version__) - 4)
    symbol = b"_ZN5torch7Library"
    data = library.read_bytes()
    assert ours in data and symbol in data
    data = data.replace(ours, other).replace(symbol, b"_ZN5torch7Missing")
    (tmp_path / "fastclip" / library.name).write_bytes(data)

    result = use_the_loss(tmp_path)
    assert len(result["warnings"]) == 1
    assert torch.__version__ in result["warnings"][0]
    assert other.decode() in result["warnings"][0]
    assert result["cpu"] != "available"
    assert result["losses"] == pytest.approx([result["truth"]] * 2, rel=1e-5)


def test_extension_is_stripped_and_loads() -> None:
    library = compiled_library()
    if sys.platform == "linux":
        assert b".debug_info" not in library.read_bytes()
    import fastclip

    assert fastclip.backends()["cpu"] == "available"


@pytest.fixture(params=["absent", "failing"])
def compiler(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """CXX: a name of nothing, or a compiler that tells its version and fails at all else."""
    if request.param == "absent":
        return "/nonexistent/c++"
    path = tmp_path / "c++"
    path.write_text('#!/bin/sh\n[ "$*" = --version ] && exec echo "failing 1.0"\nexit 1\n')
    path.chmod(0o755)
    return str(path)


def test_install_goes_on_without_a_working_compiler(
    sources: Path, tmp_path: Path, compiler: str
) -> None:
    target = tmp_path / "target"
    arguments = ("install", "-v", "--no-deps", "--no-build-isolation", "--target", str(target))
    done = pip(*arguments, str(sources), CXX=compiler)
    assert done.returncode == 0, done.stdout + done.stderr
    told = done.stdout + done.stderr
    assert "the compiled engines were not built: " in told
    assert ("no working C++ compiler" in told) == (compiler == "/nonexistent/c++")
    assert "the pure PyTorch engine serves" in told
    assert not list(target.glob("fastclip/_C*"))
    result = use_the_loss(target)
    assert len(result["warnings"]) == 1 and result["cpu"] != "available"
    assert result["losses"] == pytest.approx([result["truth"]] * 2, rel=1e-5)


def test_install_stops_without_a_working_compiler_where_one_is_required(
    sources: Path, tmp_path: Path, compiler: str
) -> None:
    target = tmp_path / "target"
    arguments = ("install", "--no-deps", "--no-build-isolation", "--target", str(target))
    done = pip(*arguments, str(sources), CXX=compiler, FASTCLIP_REQUIRE_EXTENSION="1")
    assert done.returncode != 0
    assert "FASTCLIP_REQUIRE_EXTENSION=1" in done.stdout + done.stderr
    assert not target.exists()


def launcher(folder: Path, only: str = "") -> str:
    """CXX: the compiler, with the objects of an editable installation where it has them; of those
    alone whose sources' names have `only` in them."""
    compiler = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    reuse = [sys.executable, str(ROOT / "tests/support/reuse_objects.py"), str(ROOT)]
    path = folder / "c++"
    path.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *{only}*) exec {shlex.join(reuse)} {compiler} "$@" ;; esac\n'
        f'exec {compiler} "$@"\n'
    )
    path.chmod(0o755)
    return str(path)


def test_a_wheel_with_the_extension_runs_from_an_empty_folder(
    sources: Path, tmp_path: Path
) -> None:
    """Some seconds with the objects of an editable installation, some minutes without."""
    library = compiled_library()
    arguments = ("wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(sources))
    built = pip(*arguments, CXX=launcher(tmp_path), FASTCLIP_REQUIRE_EXTENSION="1")
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("fastclip-*.whl")
    names = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"fastclip"}

    target = tmp_path / "target"
    installed = pip("install", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    assert installed.returncode == 0, installed.stderr
    assert [path.name for path in target.glob("fastclip/_C*")] == [library.name]
    result = use_the_loss(target)
    assert result["cpu"] == "available" and not result["warnings"]
    assert result["losses"] == pytest.approx([result["truth"]] * 2, rel=1e-5)
    process = python("import fastclip._C; print(fastclip._C.__file__)", target)
    assert Path(process.stdout.strip()).parent == target / "fastclip", process.stderr


BUILD_FOR_CUDA = """
import runpy, sys, torch
torch.version.cuda = sys.argv.pop()
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.mark.minutes
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has a CUDA of its own")
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_an_extension_with_the_cuda_engine_loads_without_a_card(
    sources: Path, unpacked: Path, tmp_path: Path
) -> None:
    """Beside a torch that pretends to be built for CUDA: of libtorch_cuda one function is asked."""
    compiled_library()
    told = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release (\d+\.\d+)", told)[1]
    (tmp_path / "torch_cuda.c").write_text(
        "int aoti_torch_get_current_cuda_stream(int device, void **stream) { return 1; }"
    )
    stub = str(tmp_path / "libtorch_cuda.so")
    compiler = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    c = ["-x", "c", "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", "-o", stub]
    subprocess.run([*shlex.split(compiler), *c, str(tmp_path / "torch_cuda.c")], check=True)
    built = subprocess.run(
        [sys.executable, "-I", "-c", BUILD_FOR_CUDA, "build_ext", "--build-lib", str(tmp_path),
         version],
        cwd=shutil.copytree(sources, tmp_path / "sources"),
        env=environment(
            CXX=launcher(tmp_path, only="engine_cpu"), FASTCLIP_CUDA="1",
            FASTCLIP_REQUIRE_EXTENSION="1", LIBRARY_PATH=str(tmp_path), TORCH_CUDA_ARCH_LIST="8.0",
        ),
        capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr

    shutil.copytree(unpacked, tmp_path / "installed")
    shutil.copytree(tmp_path / "fastclip", tmp_path / "installed/fastclip", dirs_exist_ok=True)
    code = (
        f"import ctypes; ctypes.CDLL({stub!r}, mode=ctypes.RTLD_GLOBAL)\n"
        "import json, fastclip\n"
        "print(json.dumps([fastclip.build_info()['cuda'], fastclip.backends()]))"
    )
    process = python(code, tmp_path / "installed")
    assert process.returncode == 0, process.stderr
    cuda, backends = json.loads(process.stdout)
    assert cuda == {"version": version, "architectures": ["sm_80"], "fused": False}
    assert backends["cpu"] == "available"
    assert backends["cuda"] == "no CUDA device is available"
