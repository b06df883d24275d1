"""Imports open_clip for tests, which are skipped if a package is missing."""

from types import ModuleType

import pytest
from support.bench import importing  # noqa: F401 -- makes `bench` importable

from bench.methods import open_clip


def import_open_clip() -> ModuleType:
    """Returns the `open_clip` module, or skips the test and names the missing package."""
    try:
        return open_clip.import_module("open_clip", ("open_clip", "torchvision", "timm"))
    except ModuleNotFoundError as error:
        if not str(error).endswith("is not installed"):
            raise
        pytest.skip(str(error))
