"""How the CUDA engine is built: what decides whether it is, for which cards, what nvcc makes of it.

Where there is an nvcc the engine's kernels are compiled for three architectures, without a warning,
a spill or a stack; objects wait in build/cuda_build until a source changes. No card is asked.
"""

import hashlib
import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from support import cuda_case

ROOT = Path(__file__).resolve().parents[3]
LOGS = ROOT / "build" / "cuda_build"
NVCC = shutil.which("nvcc")

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None, reason="setup.py needs setuptools"
)
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH")


@pytest.fixture(scope="module")
def setup() -> SimpleNamespace:
    """What setup.py defines; as a module it sets nothing up."""
    return SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))


# ---- what nvcc makes of the kernels --------------------------------------------------------------


class Kernel(NamedTuple):
    name: str
    registers: int
    stack: int
    spilled: int


def compile_for(setup: SimpleNamespace, source: Any, architecture: str) -> str:
    """What ptxas says, compiling with every warning an error."""
    gencode = f"arch=compute_{architecture[3:]},code={architecture}"
    command = [
        NVCC, *setup.NVCC_FLAGS, *source.flags, "-Werror", "all-warnings", "-Xcompiler",
        "-Wall,-Werror", "-Xptxas", "-v", "-gencode", gencode, "-c", source.path,
    ]  # fmt: skip
    version = subprocess.run([NVCC, "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(version + repr(command).encode())
    for path in [ROOT / source.path, *sorted((ROOT / "csrc").rglob("*.h"))]:
        digest.update(path.read_bytes())
    log = LOGS / f"{Path(source.path).stem}-{architecture}-{digest.hexdigest()[:16]}.log"
    if not log.exists():
        LOGS.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [*command, "-o", os.devnull], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr[-5000:]}"
        log.write_text(done.stderr)
    return log.read_text()


def kernels(log: str) -> list[Kernel]:
    found = []
    for part in log.split("Compiling entry function ")[1:]:
        name = re.match(r"'(\w+)'", part)[1]
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        sizes = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        stack, stores, loads = map(int, re.search(sizes, part).groups())
        found.append(Kernel(name, registers, stack, stores + loads))
    return found


@needs_nvcc
@pytest.mark.minutes
def test_kernels_stay_in_registers(setup: SimpleNamespace) -> None:
    """The fused ones are test_cuda_fused.py's."""
    cards = ("sm_80", "sm_90", "sm_100")
    with ThreadPoolExecutor(2) as pool:
        logs = pool.map(lambda card: compile_for(setup, setup.ENGINE, card), cards)
        found = {card: kernels(log) for card, log in zip(cards, logs, strict=True)}
    assert all(found.values())
    bad = [(card, k) for card, those in found.items() for k in those if k.stack or k.spilled]
    assert not bad, bad


@needs_nvcc
def test_a_log_is_read_rightly() -> None:
    """Of two kernels that spill."""
    log = (
        "ptxas info    : Compiling entry function '_Z1fv' for 'sm_90'\n"
        "ptxas info    : Function properties for _Z1fv\n"
        "    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 0 barriers, 16 bytes cumulative stack size\n"
    )
    assert kernels(log + log.replace("_Z1fv", "_Z1gv")) == [
        Kernel("_Z1fv", 255, 16, 20), Kernel("_Z1gv", 255, 16, 20)
    ]  # fmt: skip


# ---- the torch front -----------------------------------------------------------------------------


def test_the_front_compiles_without_cuda() -> None:
    """Neither torch's CUDA headers nor CUDA's own are needed; as it is compiled for a card."""
    if reason := cuda_case.why_not():
        pytest.skip(reason)
    command = [f for f in cuda_case.compile_unit("cuda/ops.cpp") if f != "-DFASTCLIP_EMULATED"]
    cuda_case.run([*command, "-Werror", "-fsyntax-only"])
    text = (ROOT / "csrc/cuda/ops.cpp").read_text() + (ROOT / "csrc/cuda/engine.h").read_text()
    assert not re.search(r"#include <(cuda|ATen/cuda|c10/cuda)", text)


# ---- for which cards -----------------------------------------------------------------------------

KNOWN = {f"sm_{n}" for n in (75, 80, 86, 87, 89, 90, 100, 103, 120)}


@pytest.mark.parametrize(
    "asked, expected",
    [
        ("", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "compute_120"]),
        ("8.0", ["sm_80"]),
        ("8.0;9.0+PTX", ["sm_80", "sm_90", "compute_90"]),
        ("8.0 9.0a", ["sm_80", "sm_90a"]),
        (" 8.6, 10.0f ; 12.0+PTX;", ["sm_86", "sm_100f", "sm_120", "compute_120"]),
        ("7.0;7.5;8.0;8.0", ["sm_80"]),
    ],
)
def test_a_list_of_cards(setup: SimpleNamespace, asked: str, expected: list[str]) -> None:
    assert setup.cuda_architectures(asked, KNOWN) == expected


def test_by_default_only_for_cards_that_nvcc_knows(setup: SimpleNamespace) -> None:
    known = {"sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90"}
    expected = ["sm_80", "sm_86", "sm_89", "sm_90", "compute_90"]
    assert setup.cuda_architectures("", known) == expected


@pytest.mark.parametrize(
    "asked, message",
    [
        ("Hopper", "must be numbers such as '8.0;9.0a;12.0+PTX', got 'Hopper'"),
        ("8.0;Ada+PTX", "got 'Ada+PTX'"),
        ("8", "got '8'"),
        ("9.0+ptx", "got '9.0+ptx'"),
        ("6.0;7.5", "must have a card of 8.0 or later, got '6.0;7.5'"),
        ("8.0;13.0", "has 13.0, which this nvcc does not compile for"),
    ],
)
def test_a_list_of_something_else_is_refused(
    setup: SimpleNamespace, asked: str, message: str
) -> None:
    with pytest.raises(setup.NoCuda, match=re.escape(message)):
        setup.cuda_architectures(asked, KNOWN)


# ---- whether it is built -------------------------------------------------------------------------


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another nvcc, of 12.8, in a folder of its own, found by CUDA_HOME; and no settings."""
    for name in ("FASTCLIP_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bin").mkdir()
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libcudart_static.a").touch()
    nvcc = tmp_path / "bin/nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        "--version) echo 'Cuda compilation tools, release 12.8, V12.8.93' ;;\n"
        "--list-gpu-code) echo sm_75; echo sm_80; echo sm_90 ;;\n"
        f"""--dryrun*) echo '#$ LIBRARIES=  "-L{tmp_path}/stubs" "-L{tmp_path}/lib"' >&2 ;;\n"""
        # Compiling: the source's first word says whether that works.
        '*) if grep -q "^fine" "$LAST_SOURCE"; then echo object > "$OBJECT"; echo "a warning" >&2\n'
        '   else seq -f "note %g" 100; echo "error: broken" >&2; exit 1; fi ;;\n'
        "esac\n"
    )
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    return tmp_path


def test_torch_and_nvcc_of_one_major_version(setup: SimpleNamespace, toolkit: Path) -> None:
    found = setup.find_toolkit("2.13.0+cu126", "12.6")
    assert found == (
        str(toolkit / "bin/nvcc"), "12.8", [f"{toolkit}/stubs", f"{toolkit}/lib"],
        ["sm_80", "sm_90", "compute_90"],
    )  # fmt: skip


def test_nvcc_is_found_on_path(
    setup: SimpleNamespace, toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", f"{toolkit / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert setup.find_toolkit("2.13.0+cu126", "12.6").nvcc == str(toolkit / "bin/nvcc")


def test_nvcc_is_found_where_torch_finds_a_toolkit(
    setup: SimpleNamespace, toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither on PATH nor named, as in many an image; one on PATH goes before."""
    no_nvcc(toolkit, monkeypatch)
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(toolkit))
    assert setup.find_toolkit("2.13.0+cu126", "12.6").nvcc == str(toolkit / "bin/nvcc")
    monkeypatch.setenv("PATH", str(toolkit / "bin"))
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", "/elsewhere")
    assert setup.find_nvcc() == str(toolkit / "bin/nvcc")


def no_nvcc(toolkit: Path, patch: pytest.MonkeyPatch) -> None:
    patch.delenv("CUDA_HOME")
    patch.setenv("PATH", str(toolkit / "lib"))
    patch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)


def no_nvcc_there(toolkit: Path, patch: pytest.MonkeyPatch) -> None:
    no_nvcc(toolkit, patch)
    patch.setattr("torch.utils.cpp_extension.CUDA_HOME", "/elsewhere")


def broken_nvcc(toolkit: Path, patch: pytest.MonkeyPatch) -> None:
    (toolkit / "bin/nvcc").write_text("#!/bin/sh\necho no licence >&2\nexit 1\n")


OBSTACLES = {
    "no CUDA in torch": (None, None, "torch 2.13.0 is not built for CUDA"),
    "no nvcc": ("12.6", no_nvcc, "there is no nvcc on PATH, and CUDA_HOME is not set"),
    "no nvcc where torch looks": (
        "12.6", no_nvcc_there,
        "there is no nvcc on PATH or under /elsewhere, and CUDA_HOME is not set",
    ),
    "no nvcc there": (
        "12.6", lambda toolkit, patch: (toolkit / "bin/nvcc").unlink(),
        "there is no nvcc under CUDA_HOME=",
    ),
    "another major version": (
        "13.0", None, "torch 2.13.0 is built for CUDA 13.0, nvcc is 12.8"
    ),
    "an nvcc that fails": ("12.6", broken_nvcc, "nvcc --version fails"),
    "no runtime": (
        "12.6", lambda toolkit, patch: (toolkit / "lib/libcudart_static.a").unlink(),
        "nvcc 12.8 comes without libcudart_static.a",
    ),
    "no card": (
        "12.6", lambda toolkit, patch: patch.setenv("TORCH_CUDA_ARCH_LIST", "Turing"),
        "TORCH_CUDA_ARCH_LIST must be numbers",
    ),
    "left out": (
        "12.6", lambda toolkit, patch: patch.setenv("FASTCLIP_CUDA", "0"),
        "FASTCLIP_CUDA=0 left it out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_what_stands_in_the_way_is_one_line_or_an_error(
    setup: SimpleNamespace, toolkit: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], obstacle: str,
) -> None:  # fmt: skip
    torch_cuda, arrange, message = OBSTACLES[obstacle]
    if arrange:
        arrange(toolkit, monkeypatch)
    with pytest.raises(setup.NoCuda) as raised:
        setup.find_toolkit("2.13.0", torch_cuda)
    assert message in str(raised.value)

    extension = SimpleNamespace(define_macros=[])
    setup.leave_out_cuda(extension, raised.value)
    told = capsys.readouterr().err
    assert told == f"fastclip: no CUDA engine: {raised.value.explained()}\n"
    assert ("\n  no licence\n" in told) == (arrange is broken_nvcc)
    ((name, value),) = extension.define_macros
    assert name == "FASTCLIP_WHY_NO_CUDA" and str(raised.value) in value
    monkeypatch.setenv("FASTCLIP_CUDA", "1")
    with pytest.raises(SystemExit, match="fastclip: FASTCLIP_CUDA=1, but ") as stopped:
        setup.leave_out_cuda(extension, raised.value)
    assert message in str(stopped.value) and raised.value.explained() in str(stopped.value)


def test_a_setting_of_neither_kind_is_an_error(
    setup: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTCLIP_CUDA", "yes")
    with pytest.raises(SystemExit, match="FASTCLIP_CUDA must be 0 or 1, got 'yes'"):
        setup.find_toolkit("2.13.0", "13.0")


def test_no_card_is_asked_for() -> None:
    text = (ROOT / "setup.py").read_text()
    assert not re.search(r"is_available|device_count|get_device|nvidia-smi", text)


def test_an_object_is_made_anew_when_something_changed(
    setup: SimpleNamespace, toolkit: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("csrc").mkdir()
    source, header, made = Path("csrc/a.cu"), Path("csrc/a.h"), Path("objects/a.o")
    source.write_text("fine\n")
    header.write_text("1")
    monkeypatch.setenv("LAST_SOURCE", str(source))
    monkeypatch.setenv("OBJECT", str(made))
    found = setup.find_toolkit("2.13.0", "12.6")
    unit = setup.CudaSource(str(source), ("-DA",))

    def is_made(**changes: Any) -> bool:
        made.unlink(missing_ok=True) if not made.exists() else made.write_text("old")
        result = setup.compile_cuda(found._replace(**changes), unit, Path("objects"))
        assert result == str(made)
        return made.read_text() != "old"

    assert is_made() and not is_made()
    header.write_text("2")
    assert is_made() and not is_made()
    assert is_made(architectures=["sm_90"]) and not is_made(architectures=["sm_90"])
    assert is_made(version="12.9")
    assert is_made()
    assert capfd.readouterr().err == "a warning\n" * 5
    source.write_text("broken\n")
    for _ in range(2):  # a failure is not remembered as a success
        with pytest.raises(setup.NoCuda, match=r"^nvcc 12\.8 fails at csrc/a\.cu$") as raised:
            is_made()
    # An error must say itself what nvcc found: of a failed build pip may show no other line.
    told = raised.value.explained()
    assert told.startswith("nvcc 12.8 fails at csrc/a.cu\n  [61 lines before these]\n  note 62\n")
    assert told.endswith("\n  note 100\n  error: broken")
    source.write_text("fine\n")  # nor as what was there before
    assert is_made() and not is_made()


def test_the_command_has_each_card_and_the_units_own_flags(
    setup: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("csrc").mkdir()
    Path("csrc/a.cu").touch()
    commands = []
    monkeypatch.setattr(
        subprocess, "run",
        lambda c, **_: (commands.append(c), SimpleNamespace(returncode=0, stdout=""))[1],
    )  # fmt: skip
    toolkit = setup.Toolkit("nvcc", "13.0", [], ["sm_80", "sm_90a", "compute_120"])
    setup.compile_cuda(toolkit, setup.CudaSource("csrc/a.cu", ("-DA",)), Path("objects"))
    setup.compile_cuda(toolkit, setup.CudaSource("csrc/a.cu", (), ("sm_90a",)), Path("others"))
    first, second = (" ".join(command) for command in commands)
    assert first.startswith("nvcc -std=c++17 -O3 --ftz=true") and " -DA " in first
    for code, virtual in (("sm_80", "80"), ("sm_90a", "90a"), ("compute_120", "120")):
        assert f"-gencode arch=compute_{virtual},code={code}" in first
    assert second.count("-gencode") == 1 and "arch=compute_90a,code=sm_90a" in second


def test_fused_kernels_join_where_cutlass_is_and_their_card_is_asked_for(
    setup: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("CUTLASS_PATH", raising=False)
    assert setup.cuda_sources(["sm_80", "sm_90"]) == [setup.ENGINE]
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path))
    assert setup.cuda_sources(["sm_90"]) == [setup.ENGINE]  # nothing there
    (tmp_path / "include/cutlass").mkdir(parents=True)
    (tmp_path / "include/cutlass/cutlass.h").touch()
    assert setup.cuda_sources(["sm_80", "sm_100"]) == [setup.ENGINE]
    engine, *fused = setup.cuda_sources(["sm_80", "sm_90a"])
    assert engine == setup.ENGINE._replace(flags=("-DFASTCLIP_FUSED=1",))
    assert [source.path for source in fused] == [
        "csrc/cuda/sm90/sweep.cu", "csrc/cuda/sm90/weigh.cu"
    ]  # fmt: skip
    for source in fused:
        assert source.architectures == ("sm_90a",)
        assert source.flags[-2:] == ("-I", str(tmp_path / "include"))
        assert (ROOT / source.path).exists()

    # The package's place in it is another.
    monkeypatch.delenv("CUTLASS_PATH")
    place = tmp_path / "cutlass_library"
    shutil.copytree(tmp_path / "include", place / "source/include")
    spec = SimpleNamespace(submodule_search_locations=[str(place)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert setup.cutlass_headers() == place / "source/include"
