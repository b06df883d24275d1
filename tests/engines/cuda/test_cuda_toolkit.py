"""The search for nvcc, the cards to compile for, and the reasons to build no CUDA engine."""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

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


def test_the_default_cards_are_those_that_nvcc_knows(setup: SimpleNamespace) -> None:
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
def test_a_wrong_list_of_cards_is_an_error(
    setup: SimpleNamespace, asked: str, message: str
) -> None:
    with pytest.raises(setup.NoCuda, match=re.escape(message)):
        setup.cuda_architectures(asked, KNOWN)


def test_nvcc_may_have_another_minor_version_than_torch(
    setup: SimpleNamespace, toolkit: Path
) -> None:
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
    """Used if nvcc is neither on PATH nor under CUDA_HOME, as in many images. PATH comes first."""
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
def test_an_obstacle_is_printed_or_is_an_error_if_cuda_is_required(
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
    assert told == f"fastclip: no CUDA engine: {raised.value.explained}\n"
    assert ("\n  no licence\n" in told) == (arrange is broken_nvcc)
    ((name, value),) = extension.define_macros
    assert name == "FASTCLIP_WHY_NO_CUDA" and str(raised.value) in value
    monkeypatch.setenv("FASTCLIP_CUDA", "1")
    with pytest.raises(SystemExit, match="fastclip: FASTCLIP_CUDA=1, but ") as stopped:
        setup.leave_out_cuda(extension, raised.value)
    assert message in str(stopped.value) and raised.value.explained in str(stopped.value)


def test_an_unknown_setting_is_an_error(
    setup: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTCLIP_CUDA", "yes")
    with pytest.raises(SystemExit, match="FASTCLIP_CUDA must be 0 or 1, got 'yes'"):
        setup.find_toolkit("2.13.0", "13.0")
