"""Makes `bench` importable, and holds what its tests share.

`bench` is not part of the package and is loaded from its folder, because the repository's root on
`sys.path` would make triton_kernels/ a top-level package.
"""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]


def load_bench() -> None:
    spec = importlib.util.spec_from_file_location(
        "bench", ROOT / "bench" / "__init__.py", submodule_search_locations=[str(ROOT / "bench")]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench"] = module
    spec.loader.exec_module(module)


if "bench" not in sys.modules:
    load_bench()
from bench.cases import Case  # noqa: E402
from bench.report.results import Row  # noqa: E402

TINY = Case("clip", 32, 32, 16, "float32", 14.3)


def relative(value: torch.Tensor, true: torch.Tensor) -> float:
    return float(((value.double() - true).norm() / true.norm()).detach())


def rows_of_a_case(**changes: object) -> list[Row]:
    """Rows of one large case, with invented figures and consistent ratios."""
    base = Row(
        machine="test-machine", cpu="Test CPU", threads=2, capability="AVX512", torch="2.13.0",
        python="3.11.7", compiler="g++ 12", when="2026-01-02 03:04", loss="clip", m=8192, n=8192,
        d=512, dtype="float32", data="random", scale=14.3, mode="both", rounds=5, limit=220.0,
        limit_of="brgemm", passes=3.0, gflops=110.0, fraction=0.5, err_dx=2e-7, err_dy=2e-7,
        err_dscale=2e-7,
    )  # fmt: skip
    slow = replace(base, method="open_clip", ms=4000.0, low_ms=3900.0, high_ms=4100.0,
                   over_open_clip=1.0, peak_mib=1234.5, rest_mib=1200.0)  # fmt: skip
    dense = replace(slow, method="dense", ms=3000.0, err_dx=4e-7, err_dy=4e-7, err_dscale=4e-7)
    fast = replace(base, method="fastclip", ms=1250.0, low_ms=1200.0, high_ms=1300.0,
                   over_open_clip=3.2, fraction=0.9, peak_mib=290.0, rest_mib=2.0)  # fmt: skip
    missing = replace(base, method="memeff", mode="skipped", loss="", m=0, note="no GPU, here")
    return [replace(row, **changes) for row in (slow, dense, fast)] + [missing]
