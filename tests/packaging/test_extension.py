"""Installations with, without and with an incompatible compiled module."""

import ast
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch
from support.installation import ROOT, environment, pip, python, use_the_loss


def test_an_absent_extension_warns_once_and_is_replaced(unpacked: Path) -> None:
    result = use_the_loss(unpacked)
    assert len(result["warnings"]) == 1
    assert result["cpu"] != "available"
    assert result["losses"] == pytest.approx([result["truth"]] * 2, rel=1e-5)


def test_an_extension_that_is_no_library_warns_once_and_is_replaced(
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
    """Returns the path of the installed extension. Skips, or fails if required, without one."""
    spec = importlib.util.find_spec("fastclip._C")
    if spec is None or spec.origin is None:
        assert os.environ.get("FASTCLIP_REQUIRE_EXTENSION") != "1", "fastclip._C is not installed"
        pytest.skip("fastclip is installed without its extension")
    return Path(spec.origin)


def test_an_extension_of_another_torch_warns_with_both_versions(
    unpacked: Path, tmp_path: Path
) -> None:
    """The real library is changed to need a symbol that torch does not have, like a library built
    against another version."""
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


def test_the_stub_has_the_names_and_arguments_of_the_module() -> None:
    compiled_library()
    module = importlib.import_module("fastclip._C")
    tree = ast.parse((ROOT / "fastclip/_C.pyi").read_text())
    stubs = {node.name: node.args for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert set(stubs) == {name for name in vars(module) if not name.startswith("__")}
    for name, arguments in stubs.items():
        signature = getattr(module, name).__doc__.splitlines()[0]
        names = [argument.arg for argument in arguments.args]
        defaults = [ast.unparse(default) for default in arguments.defaults]
        assert re.findall(r"(\w+): ", signature) == names
        assert re.findall(r" = ([\d.]+)", signature) == defaults


@pytest.fixture(params=["absent", "failing"])
def compiler(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A value of CXX: a missing file, or a compiler that only prints its version."""
    if request.param == "absent":
        return "/nonexistent/c++"
    path = tmp_path / "c++"
    path.write_text('#!/bin/sh\n[ "$*" = --version ] && exec echo "failing 1.0"\nexit 1\n')
    path.chmod(0o755)
    return str(path)


def test_an_installation_continues_without_a_working_compiler(
    sources: Path, tmp_path: Path, compiler: str
) -> None:
    target = tmp_path / "target"
    arguments = ("install", "-v", "--no-deps", "--no-build-isolation", "--target", str(target))
    done = pip(*arguments, str(sources), CXX=compiler)
    assert done.returncode == 0, done.stdout + done.stderr
    output = done.stdout + done.stderr
    assert "the compiled engines were not built: " in output
    assert ("no working C++ compiler" in output) == (compiler == "/nonexistent/c++")
    assert "the pure PyTorch engine serves" in output
    assert not list(target.glob("fastclip/_C*.so"))
    result = use_the_loss(target)
    (warning,) = result["warnings"]
    (reason,) = (target / "fastclip/_C.absent").read_text().splitlines()
    assert reason in output and reason in warning and reason in result["cpu"]
    assert result["losses"] == pytest.approx([result["truth"]] * 2, rel=1e-5)


def test_an_installation_fails_without_a_working_compiler_if_required(
    sources: Path, tmp_path: Path, compiler: str
) -> None:
    target = tmp_path / "target"
    arguments = ("install", "--no-deps", "--no-build-isolation", "--target", str(target))
    done = pip(*arguments, str(sources), CXX=compiler, FASTCLIP_REQUIRE_EXTENSION="1")
    assert done.returncode != 0
    assert "FASTCLIP_REQUIRE_EXTENSION=1" in done.stdout + done.stderr
    assert not target.exists()


def launcher(folder: Path, only: str = "") -> str:
    """Returns a value of CXX: the compiler, or a copy of an editable installation's objects. Its
    first word is a launcher.

    Objects are reused only if the compiler's arguments contain `only`.
    """
    compiler = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    reuse = [sys.executable, str(ROOT / "tests/support/reuse_objects.py"), str(ROOT)]
    path = folder / "c++"
    path.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *{only}*) exec {shlex.join(reuse)} {compiler} "$@" ;; esac\n'
        f'exec {compiler} "$@"\n'
    )
    path.chmod(0o755)
    return f"env {path}"


def test_a_wheel_with_the_extension_runs_from_an_empty_folder(
    sources: Path, tmp_path: Path
) -> None:
    """Takes seconds with the objects of an editable installation, minutes without."""
    library = compiled_library()
    arguments = ("wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(sources))
    built = pip(*arguments, CXX=launcher(tmp_path), FASTCLIP_REQUIRE_EXTENSION="1")
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("fastclip_loss-*.whl")
    names = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"fastclip"}

    target = tmp_path / "target"
    installed = pip("install", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    assert installed.returncode == 0, installed.stderr
    assert [path.name for path in target.glob("fastclip/_C*.so")] == [library.name]
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
    """torch pretends to be built for CUDA; a stub of libtorch_cuda has the one function needed."""
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
            CXX=launcher(tmp_path, only="cpu/engine"), FASTCLIP_CUDA="1",
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
