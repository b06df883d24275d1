"""`python -m fastclip`: what it prints, the status it ends with, and that it needs nothing."""

import json
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.installation import python

import fastclip
from fastclip import integrations
from fastclip.__main__ import main
from fastclip.diagnosis import advice, self_check
from fastclip.engine import backends


@pytest.fixture(autouse=True)
def a_small_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "SECONDS", 0.0)
    monkeypatch.setattr(self_check, "SHAPES", dict.fromkeys(self_check.SHAPES, (24, 16)))


Said = Callable[..., tuple[int, str]]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """Returns the status and the output of `python -m fastclip ARGUMENTS`."""

    def run(*arguments: str) -> tuple[int, str]:
        status = main(arguments)
        return status, capsys.readouterr().out

    return run


def test_the_text_has_versions_engines_variables_and_a_verdict(
    said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTCLIP_FP32", "ieee")
    status, text = said()
    assert status == 0
    lines = text.splitlines()
    assert lines[0].startswith(f"fastclip     {fastclip.__version__}, python 3.")
    assert f"torch {torch.__version__}" in text and "FASTCLIP_FP32=ieee" in lines
    assert lines[-1] == "verdict: every engine that can run here agrees with float64"
    assert all(len(line) <= 100 for line in lines if "=" not in line)
    for name, told in fastclip.backends().items():
        (line,) = [line for line in lines if line.startswith(f"  {name} ")]
        assert line.split(maxsplit=1)[1] in told
        if told == "available" and name not in ("reference", "cuda"):
            rows = [line.split() for line in lines if line.split()[2:3] == [name]]
            cases = [row[:2] for row in rows if "cpu" in row[3:4]]
            assert cases == [[a, b] for a in self_check.LOSSES for b in ("float32", "bfloat16")]


def test_json_has_the_same_facts(said: Said) -> None:
    status, text = said("--json", "--no-check")
    found = json.loads(text)
    assert status == 0 and found["checks"] == [] and found["engines"] == fastclip.backends()
    assert found["versions"]["torch"] == torch.__version__


def spoil(monkeypatch: pytest.MonkeyPatch, by: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Changes what the plain PyTorch engine returns for CLIP."""
    fused, *others = self_check.LOSSES["CLIP"]

    def spoilt(*inputs: torch.Tensor, backend: str) -> torch.Tensor:
        value = fused(*inputs, backend=backend)
        return by(value) if backend == "torch" else value

    monkeypatch.setitem(self_check.LOSSES, "CLIP", (spoilt, *others))
    monkeypatch.setattr(backends, "interpreted", lambda: False)  # saves a second


def with_nan_gradients(value: torch.Tensor) -> torch.Tensor:
    value = value.clone()
    value.register_hook(lambda gradient: gradient * torch.nan)
    return value


@pytest.mark.parametrize(
    "by, problem",
    [
        (lambda t: t * 1.03, "the error is 3.0e-02, at most 1.0e-04"),
        (with_nan_gradients, "a loss or a gradient is not finite"),
    ],
)
def test_a_wrong_engine_is_named(
    said: Said, monkeypatch: pytest.MonkeyPatch, by: Callable[[torch.Tensor], torch.Tensor],
    problem: str,
) -> None:  # fmt: skip
    spoil(monkeypatch, by)
    status, text = said()
    wrong = [line for line in text.splitlines() if line.startswith("WRONG: ")]
    assert status == 1 and len(wrong) == 2
    assert wrong[0] == f"WRONG: engine torch, CLIP, float32, on cpu: {problem}"
    assert text.endswith("verdict: an engine is WRONG here; please report this text\n")


def test_an_engine_that_fails_is_named(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(value: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such instruction\nat 0x0")

    spoil(monkeypatch, fail)
    status, text = said()
    assert status == 1
    line = "WRONG: engine torch, CLIP, float32, on cpu: RuntimeError: no such instruction"
    assert line in text.splitlines()


def test_the_compiled_module_that_was_not_built_is_explained(
    said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "the compiled module was not built: no working C++ compiler"
    monkeypatch.setattr(backends, "_CPU_AVAILABILITY", reason)
    monkeypatch.setattr(backends, "_MODULE", None)
    status, text = said("--no-check")
    assert status == 0 and reason in text and "default      torch for tensors on cpu" in text
    assert f"{advice.BUILD} SOURCES" in " ".join(text.split())


def test_hosts_are_listed_without_being_imported(
    said: Said, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretended = {
        "torch": '"1.0", "1.1"', "pytest": f'"{pytest.__version__}"', "not_installed": '"1"',
    }  # fmt: skip
    for package, versions in pretended.items():
        (tmp_path / f"of_{package}.py").write_text(
            "from fastclip.integrations.host import Host\n"
            f"HOST = Host({package!r}, ({versions},))\n"
        )
    monkeypatch.setattr(integrations, "__path__", [str(tmp_path)])
    monkeypatch.setattr(integrations, "HOSTS", {name: f"of_{name}" for name in pretended})
    _, text = said("--no-check")
    assert f"host pytest {pytest.__version__}: known" in text
    assert f"host torch {torch.__version__}: not known" in text
    assert "knows torch 1.0, 1.1 and leaves" in text and "not_installed" not in text


def test_another_owner_of_the_module_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    owners = {"fastclip": ["fastclip", "fastclip-loss"]}
    monkeypatch.setattr("importlib.metadata.packages_distributions", lambda: owners)
    engines = dict.fromkeys(fastclip.backends(), "available")
    found = {"engines": engines, "gpus": {"devices": []}, "hosts": {}}
    (line,) = advice.lines(found)
    assert "pip uninstall fastclip fastclip-loss" in line
    owners["fastclip"].remove("fastclip")
    assert advice.lines(found) == []


RUN = """
import os, runpy, sys
os.environ["TRITON_INTERPRET"] = "0"
sys.argv = ["fastclip", "--no-check"]
try:
    runpy.run_module("fastclip", run_name="__main__")
finally:
    heavy = {"triton", "open_clip", "transformers", "sentence_transformers", "lightly"}
    print(sorted(heavy & set(sys.modules)), file=sys.stderr)
"""


def test_it_runs_from_a_wheel_whose_module_does_not_load(unpacked: Path) -> None:
    module = unpacked / f"fastclip/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    module.write_bytes(b"fastclip built against torch 1.9\0")
    try:
        process = python(RUN, unpacked)
    finally:
        module.unlink()
    assert process.returncode == 0, process.stderr
    told = " ".join(process.stdout.split())
    assert "built against torch 1.9 and does not load with torch" in told
    assert process.stderr.strip().endswith("[]")
