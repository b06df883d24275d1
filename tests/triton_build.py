"""Compiles every kernel that the Triton engine launches, for a card that is not here.

    python triton_build.py sm_90     prints a JSON list, a row for each kernel
    python triton_build.py table     writes those of every card to triton_resources.csv

The engine itself runs, on CPU tensors, but each launch is only compiled, with the arguments that
the engine passed: so what is compiled is what a card would be given. Not under TRITON_INTERPRET.
"""

import csv
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastclip.triton_kernels import card, configurations, engine

# What a compiler is told, and the table and the limit that a card of that kind has.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), "sm_80"),
    "sm_89": (GPUTarget("cuda", 89, 32), "sm_86"),
    "sm_90": (GPUTarget("cuda", 90, 32), "sm_90"),
    "sm_100": (GPUTarget("cuda", 100, 32), "sm_100"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), "default"),
}
TABLE = Path(__file__).parent / "triton_resources.csv"
# Of a row, those in the table: what the card is asked for.
COLUMNS = ["architecture", "kernel", "case", "tile", "warps", "registers", "shared"]
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "ieee": torch.float32}
DTYPES["tf32"] = torch.float32


class Driver:
    """Enough of a driver to compile with."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def cases() -> Iterator[tuple[str, str, int, bool, bool]]:
    """loss, arithmetic, D, normalised by the engine, both sweeps in one go."""
    for loss, arithmetic in itertools.product(("softmax", "sigmoid"), DTYPES):
        yield loss, arithmetic, 768, True, loss == "sigmoid"
    yield "softmax", "bf16", 768, False, False
    yield "sigmoid", "bf16", 768, False, False
    yield "softmax", "bf16", 24, False, False
    yield "softmax", "ieee", 24, False, False
    yield "softmax", "bf16", 1000, False, False  # no step divides it
    yield "softmax", "bf16", 1001, False, False  # rows begin anywhere
    yield "sigmoid", "bf16", 1001, True, True


def run(loss: str, arithmetic: str, d: int, normalize: bool, one_go: bool) -> None:
    """One step of the engine; what it computes is garbage."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if arithmetic == "tf32" else "ieee"
    n = 256
    x, y = torch.zeros(2, n, d, dtype=DTYPES[arithmetic]).unbind()
    factors = (torch.ones(n), torch.ones(n)) if normalize else (None, None)
    scale, bias = torch.ones(()), torch.zeros(())
    block, gain = (x, y, *factors, scale, bias), torch.ones((), dtype=torch.float64)
    if one_go:
        engine.sweep_and_weigh(*block, gain, 0, loss, True, True, normalize)
        return
    keep = 128 if normalize and arithmetic == "bf16" else 0
    state, positive, kept = engine.sweep(*block, None, 0, loss, keep)
    engine.finish(state, positive, scale, bias, loss)
    engine.weigh(
        *block, state, positive, state[1], positive, gain, kept, 0, loss, True, True, normalize,
        x.dtype, x.dtype,
    )  # fmt: skip


def resources(kernel: Any, has_product: bool) -> dict[str, Any]:
    """Of a compiled kernel, by the tools that come with Triton."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        numbers = {
            name: int(re.search(rf"\.{field}:\s+(\d+)", text)[1])
            for name, field in (
                ("registers", "vgpr_count"),
                ("spilled", "vgpr_spill_count"),
                ("stack", "private_segment_fixed_size"),
            )
        }
        return numbers | {"mma": len(re.findall("v_mfma", text)), "wide": "dwordx4" in text}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def dump(what: str) -> str:
            command = [CUOBJDUMP, what, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        # Disassembly takes most of a second run, and only products are looked into.
        usage, sass = dump("-res-usage"), dump("-sass") if has_product else ""
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    local = int(re.search(r"LOCAL:(\d+)", usage)[1])
    return {
        "registers": registers,
        "stack": stack + local,
        "spilled": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "mma": len(re.findall(r"\b(?:HGMMA|HMMA|UTC\w*MMA)", sass)),
        "wgmma": "HGMMA" in sass,
        "wide": bool(re.search(r"LDG\.E(?:\.\w+)*\.128|LDGSTS\.E(?:\.\w+)*\.128|UTMALDG", sass)),
        "exponentials": len(re.findall(r"MUFU\.EX2", sass)),
    }


def build(architecture: str) -> list[dict[str, Any]]:
    target, table = TARGETS[architecture]
    driver.set_active(Driver(target))
    configurations._table = lambda device: configurations.TABLE[table]
    rows: dict[tuple[str, ...], dict[str, Any]] = {}

    def compile_only(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        compiled = kernel.warmup(*arguments, grid=(programs,), **constants)
        if compiled.hash in seen:
            return
        seen.add(compiled.hash)
        key = (kernel.__name__, *case)
        while key in rows:  # the same kernel again, for other parts of the block
            key = (*key, "again")
        rows[key] = {
            "architecture": architecture, "kernel": kernel.__name__, "case": " ".join(key[1:]),
            "tile": "x".join(str(constants[k]) for k in ("BM", "BN", "BK") if k in constants),
            "warps": compiled.metadata.num_warps, "shared": compiled.metadata.shared,
            **resources(compiled, has_product="BM" in constants),
        }  # fmt: skip

    seen: set[str] = set()
    card.launch = compile_only
    for loss, arithmetic, d, normalize, one_go in cases():
        if arithmetic == "tf32" and target.backend == "hip":
            continue
        case = (loss, arithmetic, f"D={d}", "factors" if normalize else "unit")
        run(loss, arithmetic, d, normalize, one_go)
    return list(rows.values())


def write_table(rows: list[dict[str, Any]]) -> None:
    with TABLE.open("w", newline="") as file:
        file.write(f"# Triton {triton.__version__}\n")
        table = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def recorded() -> tuple[str, list[dict[str, str]]]:
    """The Triton that the table was made with, and its rows."""
    first, *lines = TABLE.read_text().splitlines()
    return first.removeprefix("# Triton "), list(csv.DictReader(lines))


def built_apart(architecture: str) -> list[dict[str, Any]]:
    """In a process of its own: Triton remembers the first target that a kernel was compiled for."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", __file__, architecture]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, f"{architecture}:\n{done.stderr[-3000:]}"
    return json.loads(done.stdout)


def built(architectures: Sequence[str]) -> list[dict[str, Any]]:
    """Two at a time; Triton keeps what it has compiled, and a second run takes seconds."""
    with ThreadPoolExecutor(2) as pool:
        return [row for found in pool.map(built_apart, architectures) for row in found]


if __name__ == "__main__":
    if sys.argv[1:] == ["table"]:
        write_table(built(list(TARGETS)))
    else:
        print(json.dumps(build(sys.argv[1])))
