"""The build of the CUDA engine: sources, flags, recompilation, and ptxas's report on the kernels.

With nvcc the kernels are compiled for three architectures, without warnings, spills or stack
frames; reports are kept in build/cuda_build until a source changes. No test needs a GPU.
"""

import hashlib
import importlib.util
import os
import re
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


class Kernel(NamedTuple):
    name: str
    registers: int
    stack: int
    spilled: int


def compile_for(setup: SimpleNamespace, source: Any, architecture: str) -> str:
    """Returns ptxas's report; every warning is an error."""
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
    """test_cuda_fused.py tests the fused kernels."""
    cards = ("sm_80", "sm_90", "sm_100")
    with ThreadPoolExecutor(2) as pool:
        logs = pool.map(lambda card: compile_for(setup, setup.ENGINE, card), cards)
        found = {card: kernels(log) for card, log in zip(cards, logs, strict=True)}
    assert all(found.values())
    bad = [(card, k) for card, those in found.items() for k in those if k.stack or k.spilled]
    assert not bad, bad


def test_spills_are_parsed_from_the_log() -> None:
    """The log is that of two kernels that spill."""
    log = (
        "ptxas info    : Compiling entry function '_Z1fv' for 'sm_90'\n"
        "ptxas info    : Function properties for _Z1fv\n"
        "    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 0 barriers, 16 bytes cumulative stack size\n"
    )
    assert kernels(log + log.replace("_Z1fv", "_Z1gv")) == [
        Kernel("_Z1fv", 255, 16, 20), Kernel("_Z1gv", 255, 16, 20)
    ]  # fmt: skip


def test_the_front_compiles_without_cuda() -> None:
    """The flags are those of a real build; neither torch's CUDA headers nor CUDA's are needed."""
    if reason := cuda_case.why_not():
        pytest.skip(reason)
    command = [f for f in cuda_case.compile_unit("cuda/ops.cpp") if f != "-DFASTCLIP_EMULATED"]
    cuda_case.run([*command, "-Werror", "-fsyntax-only"])
    text = (ROOT / "csrc/cuda/ops.cpp").read_text() + (ROOT / "csrc/cuda/engine.h").read_text()
    assert not re.search(r"#include <(cuda|ATen/cuda|c10/cuda)", text)


def test_the_build_does_not_query_a_gpu() -> None:
    text = (ROOT / "setup.py").read_text()
    assert not re.search(r"is_available|device_count|get_device|nvidia-smi", text)


def test_an_object_is_recompiled_only_after_a_change(
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
    # The error must contain nvcc's output: pip may show no other line of a failed build.
    told = raised.value.explained
    assert told.startswith("nvcc 12.8 fails at csrc/a.cu\n  [61 lines before these]\n  note 62\n")
    assert told.endswith("\n  note 100\n  error: broken")
    source.write_text("fine\n")  # nor does the object from before the failure count
    assert is_made() and not is_made()


def test_the_command_has_every_architecture_and_the_flags_of_the_unit(
    setup: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("csrc").mkdir()
    Path("csrc/a.cu").touch()
    commands = []
    monkeypatch.setattr(
        subprocess, "run",
        lambda c, **_: (commands.append(c), SimpleNamespace(returncode=0, stdout="", stderr=""))[1],
    )  # fmt: skip
    toolkit = setup.Toolkit("nvcc", "13.0", [], ["sm_80", "sm_90a", "compute_120"])
    setup.compile_cuda(toolkit, setup.CudaSource("csrc/a.cu", ("-DA",)), Path("objects"))
    setup.compile_cuda(toolkit, setup.CudaSource("csrc/a.cu", (), ("sm_90a",)), Path("others"))
    first, second = (" ".join(command) for command in commands)
    assert first.startswith("nvcc -std=c++17 -O3 --ftz=true") and " -DA " in first
    for code, virtual in (("sm_80", "80"), ("sm_90a", "90a"), ("compute_120", "120")):
        assert f"-gencode arch=compute_{virtual},code={code}" in first
    assert second.count("-gencode") == 1 and "arch=compute_90a,code=sm_90a" in second


def test_fused_kernels_are_built_given_cutlass_and_a_request_for_sm_90(
    setup: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("CUTLASS_PATH", raising=False)
    assert setup.cuda_sources(["sm_80", "sm_90"]) == [setup.ENGINE]
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path))
    assert setup.cuda_sources(["sm_90"]) == [setup.ENGINE]  # the folder is empty
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

    # The package has its headers in another folder.
    monkeypatch.delenv("CUTLASS_PATH")
    place = tmp_path / "cutlass_library"
    shutil.copytree(tmp_path / "include", place / "source/include")
    spec = SimpleNamespace(submodule_search_locations=[str(place)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert setup.cutlass_headers() == place / "source/include"
