"""Lays fastclip out as a kernel repository: plain PyTorch and Triton, nothing compiled ahead.

    FOLDER/README.md                    the card
    FOLDER/build/torch-cpu/             the package, with metadata.json; torch-cuda/ is the same
    FOLDER/build/torch-cpu/<name>/      for versions of `kernels` that import this folder instead

`kernels` imports a variant by the id in its metadata, so that the package has this name, and its
operators are those of `torch.ops.<id>` (`engine/namespace.py`). The id holds a digest of the
sources: different builds live in one process, beside an installed fastclip.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
# The losses and what they stand on. Kernels of the Hub import the standard library and torch only.
INCLUDED = (
    "cached", "contrast.py", "distributed", "engine", "formulas", "kinds.py", "loss",
    "reference.py", "retrieval", "hub_kernel/__init__.py", "hub_kernel/layers.py",
)  # fmt: skip
BACKENDS = ("cpu", "cuda")
LICENSE = "Apache-2.0"
NO_MODULE = "a kernel of the Hub has no compiled module, an installed fastclip-loss has one"

INIT = """
from . import loss
from .hub_kernel import layers

__all__ += ["layers", "loss"]
"""

OLDER = '''"""The kernel, for versions of `kernels` that import this folder."""

import importlib.util
import sys
from pathlib import Path

_NAME = {id!r}
if _NAME not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_NAME, Path(__file__).parents[1] / "__init__.py")
    sys.modules[_NAME] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_NAME])
globals().update({{k: v for k, v in vars(sys.modules[_NAME]).items() if not k.startswith("__")}})
__all__ = sys.modules[_NAME].__all__
'''

CARD = """---
library_name: kernels
license: apache-2.0
tags:
- kernels
---

# {name}

Contrastive losses that never build the similarity matrix: CLIP, SigLIP, InfoNCE, SupCon, NT-Xent,
ranking and distillation, in one process and across ranks. Plain PyTorch and Triton: any device runs
them, CUDA devices of compute capability 8.0 or later run Triton kernels. They need Python 3.10 and
torch 2.10 or later.

```python
from kernels import get_kernel

fastclip = get_kernel("{repository}", version={version})
loss = fastclip.clip_loss(image_features, text_features, logit_scale)
```

Functions: {functions}.

Layers for `kernelize`: {layers}.
"""


def files() -> Iterator[tuple[str, bytes]]:
    """Yields the path and the content of each file of the package."""
    for name in (*INCLUDED, "triton_kernels"):
        found = PACKAGE / name
        if name == "triton_kernels":  # a checkout has it beside the package
            found = next(p for p in (found, PACKAGE.parent / name) if p.is_dir())
        for path in sorted(found.rglob("*.py")) if found.is_dir() else [found]:
            within = path.relative_to(found).as_posix()
            yield (f"{name}/{within}" if found.is_dir() else name), path.read_bytes()
    yield "__init__.py", (PACKAGE / "__init__.py").read_bytes() + INIT.encode()
    yield "_C.absent", f"{NO_MODULE}\n".encode()


def build(folder: Path, name: str = "fastclip-loss", version: int = 1, owner: str = "") -> None:
    """Writes the repository to an empty or new folder.

    name: of the kernel, in lower case with dashes. version: the kernel's major version. owner: the
    Hub's user or organisation, for the card.

    Raises:
        ValueError: a name or a version that `kernels` does not take, or a folder with other files.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise ValueError(f"name must be lower case with dashes, like fastclip-loss, got {name!r}")
    if version < 0:
        raise ValueError(f"version must be 0 or more, got {version}")
    if folder.exists() and {path.name for path in folder.iterdir()} - {"README.md", "build"}:
        raise ValueError(f"the folder must be empty, new, or a kernel repository, got {folder}")
    shutil.rmtree(folder / "build", ignore_errors=True)
    contents = dict(files())
    digest = hashlib.sha256(repr((name, version, sorted(contents.items()))).encode()).hexdigest()
    for backend in BACKENDS:
        _write_variant(folder / f"build/torch-{backend}", contents, {
            "id": f"_{name.replace('-', '_')}_{backend}_{digest[:10]}",
            "name": name, "version": version, "license": LICENSE, "python-depends": [],
            "kernel-depends": [], "backend": {"type": backend},
        })  # fmt: skip
    (folder / "README.md").write_text(_card(name, version, f"{owner or 'OWNER'}/{name}", contents))


def _write_variant(folder: Path, contents: dict[str, bytes], metadata: dict[str, object]) -> None:
    older = f"{str(metadata['name']).replace('-', '_')}/__init__.py"
    contents = {**contents, older: OLDER.format(id=metadata["id"]).encode()}
    hashes = {}
    for name, content in sorted(contents.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        hashes[name] = base64.b64encode(hashlib.sha256(content).digest()).decode()
    metadata = {**metadata, "digest": {"algorithm": "sha256", "files": hashes}}
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def _card(name: str, version: int, repository: str, contents: dict[str, bytes]) -> str:
    from .. import loss

    layers = re.findall(r"^class (\w+)", contents["hub_kernel/layers.py"].decode(), re.MULTILINE)
    functions = ["contrast", "cached_step", *(name for name in loss.__all__ if name.islower())]
    return CARD.format(
        name=name, version=version, repository=repository,
        functions=", ".join(f"`{function}`" for function in functions),
        layers=", ".join(f"`{layer}`" for layer in layers),
    )  # fmt: skip
