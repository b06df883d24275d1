"""The repository of the Hub kernel: what it imports, its metadata, and that it runs by its id.

`tests/peers/test_hub_kernel.py` loads it with `kernels`.
"""

import ast
import base64
import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fastclip
from fastclip.hub_kernel.layout import build


@pytest.fixture(scope="module")
def variant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernel")
    build(folder)
    return folder / "build/torch-cpu"


def absolute_imports(path: Path, root: Path) -> Iterator[str]:
    """Yields the modules that a file imports absolutely; asserts that the others are in the
    kernel."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
        elif isinstance(node, ast.ImportFrom):
            place = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            assert place.is_relative_to(root)
            assert place.with_suffix(".py").exists() or (place / "__init__.py").exists(), place


def test_it_imports_the_standard_library_torch_and_itself(variant: Path) -> None:
    paths = sorted(variant.rglob("*.py"))
    assert len(paths) > 100
    for path in paths:
        found = {name.partition(".")[0] for name in absolute_imports(path, variant)}
        # Torch's CUDA builds bring Triton.
        within = {"triton"} if "triton_kernels" in path.parts else set()
        assert found - set(sys.stdlib_module_names) - {"torch"} - within == set(), path


def test_the_metadata_have_the_digests_of_all_files(variant: Path, tmp_path: Path) -> None:
    ids = set()
    build(tmp_path, version=2)
    variants = variant, variant.with_name("torch-cuda"), tmp_path / "build/torch-cpu"
    for folder in variants:
        told = json.loads((folder / "metadata.json").read_text())
        assert told["name"] == "fastclip-loss" and told["license"] == "Apache-2.0"
        assert f"torch-{told['backend']['type']}" == folder.name and told["id"].isidentifier()
        ids.add(told["id"])
        files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
        del files["metadata.json"]
        assert told["digest"] == {
            "algorithm": "sha256",
            "files": {
                name: base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
                for name, path in files.items()
            },
        }
    assert len(ids) == len(variants)


def load(variant: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Imports a variant as `kernels` does: under the id in its metadata."""
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_it_runs_beside_an_installation(variant: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = load(variant, monkeypatch)
    leaves = [t.requires_grad_() for t in torch.randn(2, 20, 8)]
    theirs = fastclip.clip_loss(*leaves, 2.0, backend="torch")
    with pytest.warns(UserWarning, match="a kernel of the Hub has no compiled module"):
        ours = kernel.clip_loss(*leaves, 2.0)
    assert torch.equal(ours, theirs)
    both = (torch.autograd.grad(loss, leaves) for loss in (ours, theirs))
    for a, b in zip(*both, strict=True):
        assert torch.equal(a, b)
    assert kernel.loss.clip_loss is not fastclip.loss.clip_loss
    assert "layers" in kernel.__all__ and hasattr(torch.ops, kernel.__name__)


def test_the_folder_for_older_loaders_is_the_same_kernel(
    variant: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = load(variant, monkeypatch)
    path = variant / "fastclip_loss/__init__.py"
    spec = importlib.util.spec_from_file_location("a1b2c3", path)
    older = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(older)
    assert older.__all__ == kernel.__all__
    assert all(getattr(older, name) is getattr(kernel, name) for name in kernel.__all__)


@pytest.mark.parametrize("change", [{"name": "Fast_clip"}, {"name": "-"}, {"version": -1}])
def test_a_wrong_name_or_version_is_an_error(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(change))} must be .*, got "):
        build(tmp_path, **change)
    assert not any(tmp_path.iterdir())


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    build(tmp_path)
    build(tmp_path)
    (tmp_path / "mine").touch()
    with pytest.raises(ValueError, match="the folder must be empty"):
        build(tmp_path)
