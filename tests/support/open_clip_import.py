"""Imports open_clip for the tests, which skip by name where a package of it is missing."""

from types import ModuleType

import pytest
from support.bench import importing  # noqa: F401 -- makes `bench` importable

from bench.methods import open_clip


def import_open_clip() -> ModuleType:
    """The `open_clip` module, or a skip that names the missing package."""
    try:
        return open_clip.import_module("open_clip", ("open_clip", "torchvision", "timm"))
    except ModuleNotFoundError as error:
        if not str(error).endswith("is not installed"):
            raise
        pytest.skip(str(error))
