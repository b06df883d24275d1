"""The fused tensor-core kernels of the CUDA engine, tested without a GPU.

The kernels are compiled and inspected, their launches run against a mock runtime, and their
epilogues run on the CPU, thread by thread. Each of the two units takes a minute and 3.3 GB to
compile. Only a GPU can test the products (CUTLASS's), memory ordering between threads, and speed.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from emulation.sm90 import build
from support import cuda_case

REASON = build.why_not()
pytestmark = [pytest.mark.minutes, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

SHARED_MEMORY = 227 << 10  # of sm_90, for one thread block
MULTIPROCESSORS = 132  # the mock's


def answer(program: Path, *arguments: Any) -> dict[str, Any]:
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# ---- compiled ---------------------------------------------------------------------------------


# These are fixtures, so that a build that fails is not repeated by every test.
@pytest.fixture(scope="module")
def launcher() -> Path:
    return build.launcher()


@pytest.fixture(scope="module")
def emulator() -> Path:
    return build.emulator()


@pytest.fixture(scope="module", params=build.UNITS)
def unit(request: pytest.FixtureRequest) -> tuple[str, Path, str]:
    return request.param, *build.unit(request.param)


@pytest.fixture(scope="module")
def kernels(unit: tuple[str, Path, str]) -> list[build.Kernel]:
    if build.cuobjdump() is None:
        pytest.skip("no cuobjdump")
    return build.kernels(unit[1])


def test_nothing_is_spilled(unit: tuple[str, Path, str]) -> None:
    told = unit[2]
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", told)
    assert frames == [("0", "0", "0")] * 4, told


def test_products_are_not_serialised(unit: tuple[str, Path, str]) -> None:
    """ptxas advises (C7510 and others) if wgmma must wait for each product."""
    assert "wgmma" not in unit[2] and "serializ" not in unit[2]


def test_there_is_a_kernel_for_each_kind_and_dtype(kernels: list[build.Kernel]) -> None:
    found = {
        (kind, dtype)
        for kernel in kernels
        for kind in ("Softmax", "Sigmoid")
        for dtype in ("bfloat16_t", "half_t")
        if kind in kernel.name and dtype in kernel.name
    }
    assert len(kernels) == 4 and len(found) == 4


def test_tensor_cores_and_tensor_maps(
    unit: tuple[str, Path, str], kernels: list[build.Kernel]
) -> None:
    for kernel in kernels:
        assert kernel.count("HGMMA") >= 8 and kernel.count("UTMALDG") == 2, kernel.name
        assert (kernel.count("UTMASTG") > 0) == ("weigh" in unit[0]), kernel.name


def test_no_atomics_local_memory_or_calls(kernels: list[build.Kernel]) -> None:
    """Sums have a fixed order. Arrivals at barriers (SYNCS) are allowed."""
    for kernel in kernels:
        for prefix in ("RED", "ATOM", "STL", "LDL", "CALL"):
            assert kernel.count(prefix) == 0, (kernel.name, prefix)


def test_one_exponential_a_pair(unit: tuple[str, Path, str], kernels: list[build.Kernel]) -> None:
    """A thread has 128 pairs of a tile.

    The code of weights exists twice: for pieces with negatives only and one shift, and for all
    other pieces, in which a pair may have two shifts.
    """
    for kernel in kernels:
        exponentials = kernel.count("MUFU.EX2")
        if "sweep" in unit[0]:
            assert exponentials == 128, kernel.name
        else:
            assert exponentials <= (3 if "Softmax" in kernel.name else 2) * 128, kernel.name


# ---- launched ---------------------------------------------------------------------------------

SHAPES = [
    (m, n, d) for m, n in [(1, 1), (127, 129), (129, 127), (1000, 777)] for d in (8, 512, 520)
]
CASES = [("softmax", "bf16"), ("sigmoid", "fp16")]


def padded(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def check_map(found: dict, address: int, sizes: list[int], stride: int, box: list[int]) -> None:
    assert found["is_legal"] and found["address"] == address
    assert found["sizes"] == [*sizes, 1] and found["strides"] == [2 * stride, 0]
    assert found["box"] == [*box, 1] and found["fill"] == 0


@pytest.mark.parametrize("rows, columns, width", SHAPES)
@pytest.mark.parametrize("kind, dtype", CASES)
@pytest.mark.parametrize("kernel", ["sweep", "weigh"])
def test_launch(
    launcher: Path, kernel: str, rows: int, columns: int, width: int, kind: str, dtype: str
) -> None:
    stride_x, stride_y, stride_out = width + 8, width, padded(columns, 16)
    strides = stride_x, stride_y, stride_out
    told = answer(launcher, kernel, rows, columns, width, *strides, kind, dtype)
    tile = (128, 256) if kernel == "sweep" else (128, 128)
    down, across = -(-rows // tile[0]), -(-columns // tile[1])
    assert told["error"] == "" and told["launches"] == 1
    assert told["block"] == [384, 1, 1] and told["cluster"] == 1 and told["stream"] == 0x70
    blocks = told["grid"][0] * told["grid"][1] * told["grid"][2]
    assert min(down * across, MULTIPROCESSORS) <= blocks <= MULTIPROCESSORS
    assert told["shared"] == told["shared_limit"] <= SHARED_MEMORY
    assert told["arguments_arrive"]

    check_map(told["maps"][0], 0x10000, [width, rows], stride_x, [64, tile[0]])
    check_map(told["maps"][1], 0x20000, [width, columns], stride_y, [64, tile[1]])
    if kernel == "weigh":
        check_map(told["maps"][2], 0x110000, [columns, rows], stride_out, [32, 64])
        assert told["maps"][2]["type"] == {"fp16": 6, "bf16": 9}[dtype]
        assert told["total_parts"] == down * across * 4
    else:
        assert told["row_parts"] == across and told["column_parts"] == down
    assert told["maps_in_parameters"] == list(range(2 if kernel == "sweep" else 3))
    assert len(told["maps"]) == len(told["maps_in_parameters"])


def test_a_failed_launch_is_reported(launcher: Path) -> None:
    told = answer(launcher, "sweep", 5, 7, 8, 8, 8, 16, "softmax", "bf16", "refused")
    assert told["error"] == "fused_sweep failed on 5 x 7 logits of width 8: the mock's error"


@pytest.mark.parametrize(
    "kernel, width, strides, oddity",
    [
        ("sweep", 516, (520, 520, 16), ""),
        ("sweep", 512, (516, 512, 16), ""),
        ("weigh", 512, (512, 516, 16), ""),
        ("weigh", 512, (512, 512, 12), ""),
        ("weigh", 512, (512, 512, 16), "x"),
        ("weigh", 512, (512, 512, 16), "out"),
    ],
)
def test_views_that_tensor_maps_cannot_describe_are_an_error(
    launcher: Path, kernel: str, width: int, strides: tuple[int, ...], oddity: str
) -> None:
    """CUTLASS would launch them: it checks neither strides nor addresses."""
    told = answer(launcher, kernel, 9, 9, width, *strides, "softmax", "bf16", oddity)
    assert told["error"] and told["launches"] == 0 and told["maps"] == []


# ---- emulated ---------------------------------------------------------------------------------

BLOCKS = [
    (1, 1, 0), (1, 300, 299), (127, 129, 2), (129, 127, -2), (128, 256, 0), (300, 700, 650),
    (1000, 777, 0), (1000, 777, -500), (200, 300, -200), (200, 300, 300), (17, 33, 5),
    # tiles whose only positive is in a corner
    (300, 300, -127), (300, 300, 127), (300, 600, 255),
]  # fmt: skip


def emulated(emulator: Path, *case: Any) -> dict[str, Any]:
    told = answer(emulator, *case)
    assert told["stays_inside"] and told["is_deterministic"]
    return told


def limit(scale: float) -> float:
    """Returns the allowed relative error: t is rounded twice, and an exponential multiplies its
    error by the size of the logit."""
    return 1e-6 + 2.0**-23 * scale * 1.5


@pytest.mark.parametrize("rows, columns, offset", BLOCKS)
@pytest.mark.parametrize("factors", [0, 1])
@pytest.mark.parametrize("kind, dtype, scale", [("softmax", "bf16", 20), ("softmax", "fp16", 100),
                                                ("sigmoid", "bf16", 10)])  # fmt: skip
def test_sweep(
    emulator: Path, rows: int, columns: int, offset: int, factors: int,
    kind: str, dtype: str, scale: int,
) -> None:  # fmt: skip
    """Partial sums and positives against double. Nothing else is written."""
    told = emulated(emulator, "sweep", rows, columns, offset, kind, dtype, factors, 0, "one", scale)
    # The limit also holds for sigmoid: softplus of a logit far below zero is an exponential.
    assert told["rows"] <= limit(scale) and told["columns"] <= limit(scale)
    assert told["positives"] <= 2.0**-23


@pytest.mark.parametrize("rows, columns, offset", BLOCKS)
@pytest.mark.parametrize("factors", [0, 1])
@pytest.mark.parametrize(
    "kind, dtype, coefficients, shifts, scale",
    [
        ("softmax", "bf16", 1, "one", 20),
        ("softmax", "bf16", 1, "two", 20),
        ("softmax", "fp16", 1, "two", 20),
        ("sigmoid", "bf16", 1, "one", 10),
        ("sigmoid", "fp16", 0, "one", 10),
    ],
)
def test_weigh(
    emulator: Path, rows: int, columns: int, offset: int, factors: int,
    kind: str, dtype: str, coefficients: int, shifts: str, scale: int,
) -> None:  # fmt: skip
    """Weights, up to their rounding, and every warp's sums, against double."""
    block = "weigh", rows, columns, offset
    told = emulated(emulator, *block, kind, dtype, factors, coefficients, shifts, scale)
    ulp = {"bf16": 2.0**-8, "fp16": 2.0**-11}[dtype]
    assert told["weights"] <= ulp * 1.01
    assert told["totals"] <= limit(scale)


def test_engine() -> None:
    """The whole emulated engine with these epilogues, which tests the arguments it passes."""
    if reason := cuda_case.why_not():
        pytest.skip(f"the CUDA engine cannot be emulated: {reason}")
    program = Path(build.__file__).with_name("engine.py")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    sweeps, weighs, differing = map(int, done.stdout.split())
    assert sweeps == weighs == 58 and differing == 2
