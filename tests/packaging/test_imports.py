"""The import graph of modules has no cycle, and packages form layers."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.installation import ROOT

# A package may import those before it in this list, and modules outside the list.
LAYERS = ("fastclip.engine", "fastclip.distributed", "fastclip.loss", "fastclip.clip",
          "fastclip.demo", "fastclip.pairs")  # fmt: skip


def module_of(path: Path) -> str:
    """Returns the name by which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "triton_kernels":
        parts = ("fastclip", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, modules: set[str]) -> Iterator[str]:
    """Yields the modules that a file imports, also inside functions. `from package import name`
    counts as the submodule `name` if there is one, otherwise as the package."""
    own = module_of(path)
    package = own if path.name == "__init__.py" else own.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")
            above = above[: len(above) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield name if name in modules else base


def graph(*folders: str) -> dict[str, set[str]]:
    """Returns the modules of folders, each with those that it imports."""
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    modules = {module_of(path) for path in files}
    return {module_of(path): set(imports(path, modules)) & modules for path in files}


def cycle(edges: dict[str, set[str]]) -> list[str]:
    """Returns a cycle of modules, empty if there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in sorted(edges[module]):
            if found := visit(other, [*path, module]):
                return found
        done.add(module)
        return []

    return next(filter(None, (visit(module, []) for module in edges)), [])


@pytest.mark.parametrize("folders", [("fastclip", "triton_kernels"), ("bench",)], ids="/".join)
def test_the_import_graph_has_no_cycle(folders: tuple[str, ...]) -> None:
    edges = graph(*folders)
    assert len(edges) > 30
    assert cycle(edges) == []


def test_a_cycle_is_found() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def layer(module: str) -> int | None:
    return next((k for k, name in enumerate(LAYERS) if f"{module}.".startswith(f"{name}.")), None)


def test_packages_form_layers() -> None:
    """fastclip/train.py is in no layer: it starts the trainings, and no package imports it."""
    upwards = [
        (module, other)
        for module, others in graph("fastclip", "triton_kernels").items()
        for other in others
        if None not in (layer(module), layer(other)) and layer(other) > layer(module)
    ]
    assert upwards == []


def test_public_modules_are_attributes_of_the_package() -> None:
    code = "import fastclip; fastclip.reference.clip_loss, fastclip.distributed.clip_loss"
    subprocess.run([sys.executable, "-c", code], check=True)
