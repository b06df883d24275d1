"""The CSV of one machine: its columns, its name, and reading, replacing and writing rows.

`Row` has the columns of one process; `distributed/row.py` has those of several.
"""

from __future__ import annotations

import csv
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar, get_type_hints

import torch

RESULTS = Path(__file__).resolve().parents[1] / "results"


@dataclass
class Provenance:
    """The machine and the software that a row was measured with.

    `machine` (the file's name), `cpu` (or GPU), `threads` of a process (0 on a GPU), `capability`
    (of torch's own kernels; for a GPU such as sm_90), `torch`, `python`, `compiler` (of fastclip's
    extension), `when` (UTC).
    """

    machine: str = ""
    cpu: str = ""
    threads: int = 0
    capability: str = ""
    torch: str = ""
    python: str = ""
    compiler: str = ""
    when: str = ""

    @property
    def on_gpu(self) -> bool:
        return self.capability.startswith("sm_")


@dataclass
class Row(Provenance):
    """One method on one case. A number that was not measured is None, an empty cell in the file.

    Case: `loss`, `m`, `n`, `d`, `dtype`, `data`, `scale`, `mode` as in `cases.Case`; `method`. A
    row whose mode is "skipped" stands for a whole method; its `note` says why it did not run.

    Time: `ms`, the median of one run in milliseconds; `low_ms`, `high_ms`, its quartiles over
    `rounds` interleaved rounds; `over_dense`, `over_open_clip`, `over_compiled`, how many times
    faster than these methods in the same rounds.

    Work: `passes`, the required matmuls of 2 M N D FLOP; `gflops`, their rate;
    `limit`, the rate in GFLOP/s of a bare matmul between the same rounds; `limit_of`, the name of
    that matmul; `fraction`, gflops / limit; `fraction_of_4`, the same with four passes counted
    whatever the budget, for losses that need two sweeps.

    Memory: `peak_mib` beyond the inputs; of it `gradients_mib` for the gradients returned and
    `budget_mib` for what a memory budget keeps; `rest_mib`, the difference.

    Error against float64, relative: `err_loss`, `err_dx`, `err_dy`, `err_dscale`, the last three as
    2-norms. `note`: what went wrong, if anything.
    """

    loss: str = ""
    m: int = 0
    n: int = 0
    d: int = 0
    dtype: str = ""
    data: str = ""
    scale: float = 0.0
    mode: str = ""
    method: str = ""
    ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    rounds: int | None = None
    over_dense: float | None = None
    over_open_clip: float | None = None
    over_compiled: float | None = None
    passes: float | None = None
    gflops: float | None = None
    limit: float | None = None
    limit_of: str = ""
    fraction: float | None = None
    fraction_of_4: float | None = None
    peak_mib: float | None = None
    gradients_mib: float | None = None
    budget_mib: float | None = None
    rest_mib: float | None = None
    err_loss: float | None = None
    err_dx: float | None = None
    err_dy: float | None = None
    err_dscale: float | None = None
    note: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        """The key of a row: a later measurement replaces rows with the same key."""
        shape = (self.m, self.n, self.d)
        return (self.loss, *shape, self.dtype, self.data, self.scale, self.mode, self.method)


R = TypeVar("R", bound=Provenance)  # one type of row; it has a `key`


def columns(row_class: type[R]) -> list[str]:
    return [field.name for field in fields(row_class)]


def holds(path: Path, row_class: type[R]) -> bool:
    """True if the file has the columns of that class of row."""
    with path.open(newline="") as file:
        return next(csv.reader(file), None) == columns(row_class)


def read(path: Path, row_class: type[R] = Row) -> list[R]:
    """Reads the rows of a file.

    Raises:
        ValueError: if its columns are not those of `row_class`.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        expected, got = columns(row_class), reader.fieldnames
        if got != expected:
            raise ValueError(f"{path}: expected the columns {expected}, got {got}")
        types = get_type_hints(row_class)
        return [
            row_class(**{name: _parse(types[name], text) for name, text in cells.items()})
            for cells in reader
        ]


def _parse(type_: object, text: str) -> object:
    if type_ is str:
        return text
    if text == "":
        return None
    return int(text) if type_ in (int, int | None) else float(text)


def write(path: Path, rows: Iterable[R], row_class: type[R] = Row) -> None:
    """Replaces the file atomically, so that an interrupted run leaves a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns(row_class))
        writer.writerows(
            [_format(getattr(row, name)) for name in columns(row_class)] for row in rows
        )
    partial.replace(path)


def _format(value: object) -> object:
    return f"{value:.5g}" if isinstance(value, float) else value


def merge(old: Iterable[R], new: Iterable[R]) -> list[R]:
    """Replaces rows of `old` that `new` has again, in place, and appends the others."""
    merged = {row.key: row for row in old}
    merged.update({row.key: row for row in new})
    return list(merged.values())


def of_losses(rows: Iterable[R], losses: Iterable[str]) -> list[R]:
    """The measured rows of these losses."""
    wanted = set(losses)
    return [row for row in rows if row.loss in wanted]


def machine_row(device: str = "cpu", row_class: type[R] = Row) -> R:
    """A row with only the machine's columns."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    on_gpu = device == "cuda"
    model = torch.cuda.get_device_name() if on_gpu else _cpu_model()
    words = re.sub(r"\((r|tm)\)|\bcpu\b|processor|\d+-core|@.*", " ", model.lower())
    name = re.sub(r"[^a-z0-9]+", "-", words).strip("-") or "cpu"
    if device == "cpu":
        name = f"{name}-{_instructions()}-{cores}core"
    return row_class(
        machine=name,
        cpu=model,
        threads=0 if on_gpu else torch.get_num_threads(),
        capability=(
            "sm_{}{}".format(*torch.cuda.get_device_capability())
            if on_gpu
            else torch.backends.cpu.get_cpu_capability()
        ),
        torch=torch.__version__,
        python=platform.python_version(),
        compiler=_compiler(),
    )


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _instructions() -> str:
    """The machine's widest instructions for products, which determine its speed most."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    known = (("amx_bf16", "amx"), ("avx512_bf16", "avx512bf16"), ("avx512f", "avx512"))
    for flag, name in (*known, ("avx2", "avx2")):
        if re.search(rf"\b{flag}\b", text):
            return name
    return platform.machine()


def _compiler() -> str:
    try:
        from fastclip import _C
    except ImportError:
        return "none: fastclip has no compiled extension here"
    return str(_C.build_info()["compiler"])
