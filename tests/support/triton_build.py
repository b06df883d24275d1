"""Compiles every kernel that the Triton engine launches, without the card it is compiled for.

    python triton_build.py sm_90         prints a JSON list with a row for each kernel
    python triton_build.py sm_90 few     prints the rows of the two losses' usual steps only
    python triton_build.py table         writes the rows of every card to triton_resources.csv
    python triton_build.py candidates    prints the rows of sm_90's candidate tiles

The engine itself runs, on CPU tensors, but each launch is only compiled, with the arguments that
the engine passed: a card would be given the same kernels. TRITON_INTERPRET must not be set.
"""

import contextlib
import csv
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastclip.engine import arithmetic as settings
from fastclip.engine.block import Block, Side, SweepResults, Upstream, Wanted
from fastclip.kinds import KINDS, kind_of
from fastclip.triton_kernels import configurations, engine, launch, plan

# The compiler's target for each card, and the name of its table and of its shared memory limit.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), "sm_80"),
    "sm_89": (GPUTarget("cuda", 89, 32), "sm_86"),
    "sm_90": (GPUTarget("cuda", 90, 32), "sm_90"),
    "sm_100": (GPUTarget("cuda", 100, 32), "sm_100"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), "default"),
}
TABLE = Path(__file__).parents[1] / "engines/triton/triton_resources.csv"
# The fields of a row that the table holds.
COLUMNS = ["architecture", "kernel", "case", "tile", "warps", "registers", "shared"]
COLUMNS += ["instructions", "barriers", "stores", "spilled"]
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/ +\S")
WIDTHS = {"U8": "8", "U16": "16", "32": "32", "64": "64", "128": "128"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "ieee": torch.float32}
DTYPES["tf32"] = DTYPES["split"] = torch.float32


class Driver:
    """The part of a driver that compiling needs."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Case(NamedTuple):
    """A step that the engine is taken through; every kernel that it launches is compiled."""

    kind: str
    arithmetic: str
    d: int
    normalize: bool = False
    one_go: bool = False
    small: bool = False
    kept: bool = False
    masked: bool = False  # every option of a block
    targets: str = ""  # "teacher" or "guide"

    def __str__(self) -> str:
        words = [self.kind, self.arithmetic, f"D={self.d}"]
        flags = ("one_go", "small", "kept", "masked")
        words += ["factors" if self.normalize else "unit", *(f for f in flags if getattr(self, f))]
        return " ".join([*words, *filter(None, [self.targets])])


def cases() -> Iterator[Case]:
    for kind, arithmetic in itertools.product(KINDS, DTYPES):
        yield Case(kind, arithmetic, 768, True, one_go=kind_of(kind).is_linear)
    for kind in KINDS:
        yield Case(kind, "bf16", 768)
        if not kind_of(kind).has_levels:
            yield Case(kind, "bf16", 768, True, kept=True)
        yield Case(kind, "bf16", 768, True, one_go=kind_of(kind).is_linear, small=True)
        yield Case(kind, "bf16", 768, True, masked=True)
    for arithmetic in DTYPES:
        yield Case("softmax", arithmetic, 768, True, targets="teacher")
    yield Case("sigmoid", "bf16", 768, True, masked=True, targets="teacher")
    yield Case("softmax", "bf16", 768, True, masked=True, targets="guide")
    yield Case("softmax", "fp16", 768, True, kept=True)
    yield Case("sigmoid", "bf16", 768, one_go=True)
    yield Case("softmax", "bf16", 24)
    yield Case("softmax", "ieee", 24)
    yield Case("softmax", "bf16", 1000)  # no step divides it
    yield Case("softmax", "bf16", 1001)  # rows begin anywhere
    yield Case("sigmoid", "bf16", 1001, True, one_go=True)


# The cases that `make test` has time for: the usual steps of the two losses.
FEW = (Case("softmax", "bf16", 768, True), Case("sigmoid", "bf16", 768, True, one_go=True))


def run(case: Case) -> None:
    """Takes the engine through one step. Its results are garbage."""
    kind, arithmetic, d, normalize, one_go, small, kept, masked, targets = case
    torch.backends.cuda.matmul.fp32_precision = "tf32" if arithmetic == "tf32" else "ieee"
    settings.fp32 = lambda: "split" if arithmetic == "split" else "ieee"
    plan.SMALL_PAIRS = 1 << 23 if small else 0
    n = 1024  # several tiles of any size, and so plain ones
    x, y = torch.zeros(2, n, d, dtype=DTYPES[arithmetic]).unbind()
    factor, ids = torch.ones(n) if normalize else None, torch.zeros(n, dtype=torch.int32)
    options = (ids, torch.ones(n)) if masked else (None, None)
    if targets:
        options = (*options, x, factor)
    scale, bias, gain = torch.ones(()), torch.zeros(()), torch.ones((), dtype=torch.float64)
    block = Block(
        Side(x, factor, *options), Side(y, factor, *options), scale, bias,
        torch.zeros(n) if masked else None, scale if targets == "teacher" else None, kind=kind,
        same_id_positive=masked and not kind_of(kind).has_levels, guided=targets == "guide",
    )  # fmt: skip
    if one_go:
        engine.sweep_and_weigh(block, gain, True, True, normalize)
        return
    levels = torch.zeros(2 * n, dtype=torch.float64) if kind_of(kind).has_levels else None
    statistics = SweepResults(*engine.sweep(block, None, None, levels, 512 if kept else 0))
    state, positive, _ = statistics
    if levels is None:
        engine.finish(state[:2], positive, scale, bias, kind)
    sums = state[: len(state) // 2 * 2][1::2]
    coefficients = sums if len(sums) > 1 else sums[0]
    wanted = Wanted(True, True, masked, normalize, x.dtype, x.dtype)
    engine.weigh(block, statistics, Upstream(coefficients, positive, gain), wanted)


def stores(sass: str) -> str:
    """Counts stores to global memory by their width in bits. TMA stores whole tiles."""
    widths = Counter(
        next((part for part in parts.split(".") if part in WIDTHS), "32")
        for parts in re.findall(r"\bSTG\.(\S+)", sass)
    )
    found = [f"{WIDTHS.get(width, width)}x{widths[width]}" for width in sorted(widths)]
    return " ".join([*found, *(["TMA"] if "UTMASTG" in sass else [])])


def resources(kernel: Any, pairs: int) -> dict[str, Any]:
    """Returns what a compiled kernel takes, read by Triton's own tools. pairs: of each thread."""
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
        return numbers | {
            "mma": len(re.findall("v_mfma", text)), "wide": "dwordx4" in text, "instructions": "",
            "barriers": len(re.findall("s_barrier", text)), "stores": "",
        }  # fmt: skip
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def dump(what: str) -> str:
            command = [CUOBJDUMP, what, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        # Disassembly takes most of the time of a cached run, and only kernels of tiles need it.
        usage, sass = dump("-res-usage"), dump("-sass") if pairs else ""
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
        "instructions": f"{len(INSTRUCTION.findall(sass)) / pairs:.0f}" if pairs else "",
        "barriers": len(re.findall(r"\bBAR\.SYNC", sass)) if pairs else "",
        "stores": stores(sass),
    }


def build(architecture: str, tried: Iterable[Case]) -> list[dict[str, Any]]:
    """Returns a row for each kernel of the cases, compiled for an architecture."""
    target, table = TARGETS[architecture]
    driver.set_active(Driver(target))
    configurations._table = lambda device: configurations.TABLE[table]
    launch._processors = lambda device: 132
    rows: dict[tuple[str, ...], dict[str, Any]] = {}

    def compile_only(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        compiled = kernel.warmup(*arguments, grid=(programs,), **constants)
        if compiled.hash in seen:
            return
        seen.add(compiled.hash)
        key = (kernel.__name__, str(case))
        while key in rows:  # the same kernel again, compiled for another chunk
            key = (key[0], f"{key[1]} again")
        warps = compiled.metadata.num_warps
        pairs = constants.get("BM", 0) * constants.get("BN", 0) // (32 * warps)
        rows[key] = {
            "architecture": architecture, "kernel": kernel.__name__, "case": key[1],
            "tile": "x".join(str(constants[k]) for k in ("BM", "BN", "BK") if k in constants),
            "warps": warps, "shared": compiled.metadata.shared, **resources(compiled, pairs),
        }  # fmt: skip

    seen: set[str] = set()
    launch.launch = compile_only
    for case in tried:
        if case.arithmetic not in ("tf32", "split") or target.backend != "hip":
            run(case)
    return list(rows.values())


class Compiled(Exception):
    """Raised after the wanted kernel is compiled: the rest of the step need not run."""


def build_candidates() -> list[dict[str, Any]]:
    """Returns rows of the plain tiles of every candidate for sm_90. Candidates that differ only in
    the order of programs share their code, and one row."""
    driver.set_active(Driver(TARGETS["sm_90"][0]))
    launch._processors = lambda device: 132
    plain, normal = Case("softmax", "bf16", 768), Case("softmax", "bf16", 768, True)
    tried = {
        "sweep": ("sweep_kernel", [plain, normal, Case("sigmoid", "bf16", 768, True)]),
        "kept": ("sweep_kernel", [normal._replace(kept=True)]),
        "weigh": ("weigh_kernel", [plain, normal, normal._replace(arithmetic="fp16")]),
        "both": (
            "weigh_kernel", [c._replace(kind="sigmoid", one_go=True) for c in (plain, normal)]
        ),
    }  # fmt: skip
    return [row for name in tried for row in _candidates_of(name, *tried[name])]


def _candidates_of(name: str, wanted: str, cases: list[Case]) -> list[dict[str, Any]]:
    table, rows = configurations.TABLE["sm_90"], []
    default = table[name, "half", "wide"]

    def compile_only(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        if kernel.__name__ == wanted:
            compiled = kernel.warmup(*arguments, grid=(programs,), **constants)
            row = {"kernel": name, "config": config, "shared": compiled.metadata.shared}
            rows.append({**row, **resources(compiled, 1)})
            raise Compiled

    launch.launch = compile_only
    every = (c._replace(group=8) for c in configurations.candidates(default, name))
    for config in dict.fromkeys(every):
        chosen = {**table, (name, "half", "wide"): config}
        configurations._table = lambda device, chosen=chosen: chosen
        for case in cases:
            with contextlib.suppress(Compiled):
                run(case)
    return rows


def write_table(rows: list[dict[str, Any]]) -> None:
    with TABLE.open("w", newline="") as file:
        file.write(f"# Triton {triton.__version__}\n")
        table = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def recorded() -> tuple[str, list[dict[str, str]]]:
    """Returns the version of Triton that made the table, and its rows."""
    first, *text_lines = TABLE.read_text().splitlines()
    return first.removeprefix("# Triton "), list(csv.DictReader(text_lines))


@functools.cache
def built(*what: str) -> list[dict[str, Any]]:
    """Runs this file in a process of its own: Triton remembers the first target that it compiled a
    kernel for. Returns the rows."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-I", __file__, *what]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, f"{what}:\n{done.stderr[-3000:]}"
    return json.loads(done.stdout)


def built_together(architectures: Sequence[str]) -> list[dict[str, Any]]:
    """Builds two architectures at a time. Triton caches its results: a second run takes seconds."""
    with ThreadPoolExecutor(2) as pool:
        return [row for found in pool.map(built, architectures) for row in found]


if __name__ == "__main__":
    if sys.argv[1:] == ["table"]:
        write_table(built_together(list(TARGETS)))
    else:
        what, *few = sys.argv[1:]
        rows = build_candidates() if what == "candidates" else build(what, FEW if few else cases())
        print(json.dumps(rows))
