"""Compiles the tests' launches without running them: `pytest -p bench.gpu.bundle.plugin`.

The tests' assertions on results fail, which is ignored: only Triton's cache matters.
"""

from __future__ import annotations

from typing import Any

from . import pretended


def pytest_configure(config: Any) -> None:
    pretended.pretend()


def pytest_collection_finish(session: Any) -> None:
    """Skips comparisons with the dense truth, which would take most of the time."""
    from support import dense_truth, gpu_engine_case, masked_cases

    for module in (dense_truth, gpu_engine_case, masked_cases):
        for name in ("assert_states", "assert_gradients"):
            if hasattr(module, name):
                setattr(module, name, lambda *arguments, **options: None)
