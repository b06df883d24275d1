"""Compiles the tests' launches without running them: `pytest -p bench.gpu.bundle.plugin`.

The tests' assertions on results fail, which is ignored: only Triton's cache matters.
"""

from __future__ import annotations

import sys
from typing import Any

from . import pretended


def pytest_configure(config: Any) -> None:
    pretended.pretend()


def pytest_collection_finish(session: Any) -> None:
    """Skips comparisons with the dense truth, which would take most of the time."""
    from support import dense_truth

    for name in ("assert_states", "assert_gradients"):
        own = getattr(dense_truth, name)
        # Test modules have imported the function by its name.
        for module in list(sys.modules.values()):
            if getattr(module, "__dict__", {}).get(name) is own:
                setattr(module, name, lambda *arguments, **options: None)
