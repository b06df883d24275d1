"""Bundles: made on a machine without a card, and used by `make gpu` as far as they fit."""

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
import torch
from support.bench.importing import ROOT
from support.bench.rehearsal import Rehearsal

from bench.gpu import install, process, steps
from bench.gpu.bundle import __main__ as making
from bench.gpu.bundle import contents

NAME = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or sys.platform != "linux", reason="needs Triton"
)  # fmt: skip


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A tree to install from, instead of this one."""
    (tmp_path / "root" / "fastclip").mkdir(parents=True)
    monkeypatch.setattr(process, "ROOT", tmp_path / "root")
    monkeypatch.setattr(install, "PEERS", tmp_path / "root" / "build" / "peers")
    return tmp_path / "root"


@pytest.fixture
def bundle(tmp_path) -> Path:
    """A bundle that fits this machine."""
    made = tmp_path / "bundle"
    (made / contents.WHEELS).mkdir(parents=True)
    (made / contents.WHEELS / "one-1.0-py3-none-any.whl").touch()
    (made / NAME).write_bytes(b"extension")
    (tmp_path / "kernel.cubin").write_bytes(b"code")
    with tarfile.open(made / contents.CACHE, "w:xz") as archive:
        archive.add(tmp_path / "kernel.cubin", "ABC/kernel.cubin")
    describe(made, triton_cache=str(tmp_path / "cache"))
    return made


def describe(bundle: Path, **changes: str | None) -> None:
    """Changes entries of the bundle's description; None removes one."""
    file = bundle / contents.DESCRIPTION
    told = json.loads(file.read_text()) if file.exists() else {
        "torch": torch.__version__, "sources": contents.digest_of_sources(),
    }  # fmt: skip
    changed = {**told, **changes}
    file.write_text(json.dumps({name: said for name, said in changed.items() if said is not None}))


class Commands:
    """Replaces `process.run`; records the commands and the variables added to the environment."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.ran: list[tuple[list[str], dict[str, str]]] = []
        self.fails = lambda command, environment: False
        patch.setattr(process, "run", self.run)

    def run(self, command, seconds, say, environment):
        self.ran.append((command, environment))
        failed = self.fails(command, environment)
        return process.Ended(int(failed), True, "")

    @property
    def installed(self) -> list[dict[str, str]]:
        names = ("FASTCLIP_SKIP_EXTENSION", "FASTCLIP_CUDA", "FASTCLIP_REQUIRE_EXTENSION",
                 "TORCH_CUDA_ARCH_LIST")  # fmt: skip
        return [
            {name: more[name] for name in names if name in more}
            for command, more in self.ran if command == install.EDITABLE
        ]  # fmt: skip


@pytest.fixture
def commands(monkeypatch) -> Commands:
    return Commands(monkeypatch)


def session(tmp_path: Path, bundle: Path | None = None, device: str = "cpu") -> steps.Session:
    made = steps.Session(tmp_path / "out", 1e12, device, bundle=bundle)
    made.out.mkdir(exist_ok=True)
    return made


def said(made: steps.Session) -> str:
    log = made.file("log.txt")
    return log.read_text() if log.exists() else ""


def test_a_bundle_that_fits_is_used(tmp_path, root, bundle, commands, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/before")
    made = session(tmp_path, bundle)
    outcome = install.install(made, 60.0)
    assert (outcome.status, outcome.note) == ("passed", "from the bundle")
    assert (root / "fastclip" / NAME).read_bytes() == b"extension"
    assert commands.installed == [
        {"FASTCLIP_SKIP_EXTENSION": "1", "FASTCLIP_REQUIRE_EXTENSION": "0"}
    ]
    assert (tmp_path / "cache" / "ABC" / "kernel.cubin").read_bytes() == b"code"
    assert made.environment["TRITON_CACHE_DIR"] == str(tmp_path / "cache")
    # Peers are installed apart from the system's packages, and later steps find them.
    wheels = next(command for command, _ in commands.ran if "--target" in command)
    assert wheels[wheels.index("--target") + 1] == str(install.PEERS) and "--no-index" in wheels
    assert made.environment["PYTHONPATH"] == f"{install.PEERS}{os.pathsep}/before"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda b: (b / NAME).unlink(), f"it has no {NAME}"),
        (lambda b: describe(b, torch="1.0"), "it was built against torch 1.0"),
        (lambda b: describe(b, sources="other"), "it was built from other sources"),
        (lambda b: (b / contents.DESCRIPTION).write_text("{"), "cannot be read"),
        (
            lambda b: (b / contents.DESCRIPTION).write_text("[]"),
            "lacks torch, sources, triton_cache",
        ),
        (lambda b: describe(b, torch=None), "lacks torch: it does not fit; building"),
        (lambda b: describe(b, sources=None), "lacks sources: it does not fit"),
        (lambda b: describe(b, triton_cache=None), "lacks triton_cache: it does not fit"),
    ],
)
def test_an_extension_that_does_not_fit_is_built_here(
    spoil, reason, tmp_path, root, bundle, commands
):
    spoil(bundle)
    made = session(tmp_path, bundle)
    outcome = install.install(made, 60.0)
    assert (outcome.status, outcome.note) == ("passed", "built") and reason in said(made)
    assert not (root / "fastclip" / NAME).exists()
    assert "FASTCLIP_SKIP_EXTENSION" not in commands.installed[-1]


def test_an_extension_that_does_not_load_is_removed(tmp_path, root, bundle, commands):
    commands.fails = lambda command, more: command[1] == "-c" and command[2] != install.ENGINES
    made = session(tmp_path, bundle)
    install.install(made, 60.0)
    assert "it does not load here" in said(made) and not (root / "fastclip" / NAME).exists()
    assert len(commands.installed) == 2


def test_a_cache_that_cannot_be_unpacked_is_not_used(tmp_path, root, bundle, commands):
    (bundle / contents.CACHE).write_bytes(b"no archive")
    made = session(tmp_path, bundle)
    outcome = install.install(made, 60.0)
    assert "no warm Triton cache" in said(made) and "TRITON_CACHE_DIR" not in made.environment
    assert outcome.note == "from the bundle"


def test_a_cache_of_another_user_is_left_alone(tmp_path, root, bundle, commands, monkeypatch):
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    (tmp_path / "cache").mkdir()
    made = session(tmp_path, bundle)
    assert install.install(made, 60.0).note == "from the bundle"
    assert "is not owned by this user" in said(made)
    assert "TRITON_CACHE_DIR" not in made.environment and not list((tmp_path / "cache").iterdir())


def test_a_failing_nvcc_is_reported_and_the_rest_is_built(tmp_path, root, commands, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    made = session(tmp_path, device="cuda")
    assert install.install(made, 60.0).note == "built with the CUDA engine"
    assert commands.installed == [
        {"FASTCLIP_CUDA": "1", "FASTCLIP_REQUIRE_EXTENSION": "0", "TORCH_CUDA_ARCH_LIST": "9.0"}
    ]
    commands.fails = lambda command, more: more.get("FASTCLIP_CUDA") == "1"
    outcome = install.install(made, 60.0)
    assert outcome.status == "FAILED" and outcome.note == "built without the CUDA engine"
    assert "the CUDA engine was not built" in outcome.failures[0]
    assert commands.installed[-1]["FASTCLIP_CUDA"] == "0"
    commands.fails = lambda command, more: True
    assert install.install(made, 60.0).note == "not built"


def test_a_bundle_is_used_by_the_whole_run(tmp_path, root, bundle, monkeypatch):
    """The environment that the installation sets applies to all later commands."""
    rehearsal = Rehearsal(monkeypatch, real=False)
    made = rehearsal.session(tmp_path, bundle=bundle)
    seen = []

    def command(session):
        return [sys.executable, "-m", "pytest"]

    def run(command, seconds, say, environment=None, grace=0.0):
        seen.append(environment.get("TRITON_CACHE_DIR"))
        return process.Ended(0, True, "")

    monkeypatch.setattr(process, "run", run)
    todo = [steps.Step("install", 60, install.install)]
    todo.append(steps.Step("later", 60, steps.commanded("later", command)))
    steps.run_all(todo, made)
    assert seen[-1] == str(tmp_path / "cache")


# ---- making one --------------------------------------------------------------------------------


def test_a_part_that_cannot_be_made_and_a_bundle_too_large_are_reported(
    tmp_path, monkeypatch, capsys
):
    pytest.importorskip("triton")
    monkeypatch.setattr(making, "copy_tree", lambda: None)

    def missing(bundle: Path) -> str:
        raise making.Missing("no nvcc")

    def large(bundle: Path) -> str:
        with (bundle / "large").open("wb") as file:
            file.truncate(contents.LARGEST + 1)
        return "large"

    folder = str(tmp_path / "bundle")
    monkeypatch.setattr(making, "PARTS", {"extension": missing, "cache": lambda bundle: "warm"})
    assert making.main([folder]) == 1
    out = capsys.readouterr().out
    assert "extension: FAILED: no nvcc" in out and "cache: warm" in out
    described = tmp_path / "bundle" / contents.DESCRIPTION
    told = json.loads(described.read_text())
    assert told["sources"] == "" and told["torch"] == torch.__version__
    # The other parts of a bundle may be made again without its extension.
    making.describe(tmp_path / "bundle", sources="those it was built from")

    monkeypatch.setattr(making, "PARTS", {"cache": lambda bundle: "warm"})
    assert making.main([folder]) == 0
    assert json.loads(described.read_text())["sources"] == "those it was built from"
    monkeypatch.setattr(making, "PARTS", {"cache": large})
    assert making.main([folder]) == 1
    assert "at most 45 MiB" in capsys.readouterr().err


def test_wheels_that_cannot_be_had_are_named(tmp_path, monkeypatch):
    def run(command, *others, **more):
        if "memeff" in command[-1]:
            return 1
        Path(command[command.index("--dest") + 1], f"{command[-1]}.whl").touch()
        return 0

    monkeypatch.setattr(making, "run", run)
    told = making.make_wheels(tmp_path)
    assert told == f"{len(making.WHEELS) - 1} wheels; not available: memeff==0.3.1"


def test_the_copied_tree_has_fastclip_as_an_installation_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr(making, "TREE", tmp_path)
    for _ in range(2):  # again, over what is there
        making.copy_tree()
        assert (tmp_path / "site" / "fastclip" / "triton_kernels" / "__init__.py").exists()
        assert not list(tmp_path.rglob("*.so")) and (tmp_path / "csrc" / "cpu" / "ops.cpp").exists()


COMPILE = """
from bench.gpu import smoke, smoke_checks
from bench.gpu.bundle import pretended
pretended.pretend()
import torch
problem = smoke_checks.Problem("siglip", torch.bfloat16, False, 48, 32, 14.3, "cpu")
problem.step("triton", problem.leaves())
"""


@pytest.mark.minutes
@needs_triton
def test_launches_are_compiled_for_a_simulated_card(tmp_path):
    """Everything that a launch needs is compiled, and nothing twice."""
    environment = {
        **os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONSAFEPATH": "",
    }  # fmt: skip

    def compiled() -> dict[str, float]:
        done = subprocess.run(
            [sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True,
            text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        found = [path for path in tmp_path.rglob("*") if path.suffix in making.CACHED]
        return {str(path): path.stat().st_mtime for path in found}

    first = compiled()
    for path in list(tmp_path.rglob("*")):  # what is carried must suffice
        if path.is_file() and path.suffix not in making.CACHED:
            path.unlink()
    assert compiled() == first
    names = {Path(path).name for path in first}
    assert "complete_kernel.cubin" in names
    # On a card the forward of a sigmoid loss computes the gradients, in one go.
    kernels = {name.partition(".")[0] for name in names}
    assert "weigh_edges_kernel" in kernels and "sweep_edges_kernel" not in kernels, kernels
    (utils,) = (Path(path) for path in first if Path(path).name.startswith("cuda_utils"))
    # Linked by the name that the dynamic loader will look for.
    assert b"libcuda.so.1\0" in utils.read_bytes()
    told = [
        json.loads(path.read_text())
        for path in tmp_path.rglob("*_kernel.json") if not path.name.startswith("__grp__")
    ]  # fmt: skip
    assert {one["target"]["arch"] for one in told} == {90}
