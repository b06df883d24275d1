"""The names and limits of a bundle's files, shared by its maker and `bench.gpu.install`."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ..process import ROOT

DESCRIPTION, CACHE, WHEELS = "bundle.json", "triton-cache.tar.xz", "wheels"
KEYS = ("torch", "sources", "triton_cache")  # of the description
# Triton's index of a kernel holds absolute paths: the cache must have the same path when it is made
# and when it is used.
TRITON_CACHE = "/var/tmp/fastclip-triton-cache"
LARGEST = 45 << 20


def digest_of_sources(root: Path = ROOT) -> str:
    """A digest of the extension's sources; an extension fits only the sources it was built from."""
    digest = hashlib.sha256()
    sources = sorted(path for path in (root / "csrc").rglob("*") if path.is_file())
    for path in [root / "setup.py", *sources]:
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def size_of(folder: Path) -> int:
    return sum(
        (Path(place) / name).stat().st_size for place, _, names in os.walk(folder) for name in names
    )
