"""The tests' launches, compiled and not run: `pytest -p bench.gpu.bundle.plugin`.

What tests assert of results fails, and nobody looks: their kernels are in Triton's cache.
"""

from __future__ import annotations

from typing import Any

from . import pretended


def pytest_configure(config: Any) -> None:
    pretended.pretend()


def pytest_collection_finish(session: Any) -> None:
    """Comparisons with the dense truth would take most of the time."""
    from support import dense_truth, gpu_engine_case, masked_cases

    for module in (dense_truth, gpu_engine_case, masked_cases):
        for name in ("assert_states", "assert_gradients"):
            if hasattr(module, name):
                setattr(module, name, lambda *arguments, **options: None)
