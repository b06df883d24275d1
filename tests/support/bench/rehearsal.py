"""Rehearses `make gpu` without a card and without processes, on tiny problems on the CPU.

Commands of steps run in this process. Each takes the seconds of a table, on a clock that only
`Rehearsal` advances. Before each command `look` is called, to see the files that a cut would leave.
"""

import importlib
import io
import sys
import types
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.bench.importing import TINY

import fastclip.triton_kernels
from bench.gpu import (
    cases,
    counters,
    install,
    kernels,
    process,
    rates,
    rows,
    smoke,
    smoke_checks,
    steps,
    tiles,
)
from bench.losses import loss_of
from bench.measure import memory, runner

NCU = """==PROF== Connected to process 1
"ID","Kernel Name","gpu__time_duration.sum","lts__t_bytes.sum","launch__registers_per_thread"
"","","us","byte","register/thread"
"0","sweep_kernel","2,600.5","1,000","178"
"""


class Config(NamedTuple):
    bm: int
    stages: int
    descriptors: bool


class Configurations(types.ModuleType):
    """Replaces the Triton engine's choice of tiles; one of the candidates does not fit."""

    Config = Config

    @staticmethod
    def choose(device, dtype, tf32, d, unit, kernel, run=None) -> Config:
        return Config(128, 3, False)

    @staticmethod
    def candidates(default: Config, kind: str) -> list[Config]:
        return [default, default._replace(stages=4), default._replace(descriptors=True)]


def tile_step(loss: str, n: int, d: int, device: str, keeps: bool = False) -> None:
    """Asks for the tiles of one kernel, like the engine."""
    kernel = "both" if loss_of(loss).in_one_go else "sweep"

    def run(config: Config) -> None:
        if config.stages == 4:
            raise RuntimeError("out of resource: shared\nmemory")

    sys.modules["fastclip.triton_kernels.configurations"].choose(
        device, "torch.bfloat16", False, d, 8, kernel, run
    )


class Limit:
    """A GEMM limit that takes no time to measure."""

    source = "nothing"

    def __init__(self, half: bool, device: str) -> None:
        pass

    def sample(self) -> None:
        pass

    def take(self) -> float:
        return 100.0


class Rehearsal:
    """Replaces `process.run`. `seconds` holds the duration of each step, `codes` the exit status of
    failing ones. Unless `real`, no step's code runs: such tests check only the order of steps."""

    def __init__(self, patch: pytest.MonkeyPatch, real: bool = True) -> None:
        self.now, self.real = 1000.0, real
        self.seconds = {"headline": 100.0, "tiles": 25.0, "card": 90.0, "losses": 60.0, "ncu": 5.0}
        self.codes: dict[str, int] = {}
        self.look: Callable[[str], None] = lambda name: None
        patch.setattr(process, "run", self.run)
        _make_small(patch)
        self.patch = patch

    def clock(self) -> float:
        return self.now

    def session(self, out: Path, seconds: float = 480.0, **options: Any) -> steps.Session:
        return steps.Session(out, self.now + seconds, "cpu", clock=self.clock, **options)

    def run(
        self, command: Sequence[str], seconds: float, say: Callable[[str], None],
        environment: dict[str, str] | None = None, grace: float = process.GRACE,
    ) -> process.Ended:  # fmt: skip
        name = name_of(command)
        self.look(name)
        took = self.seconds.get(name, 10.0)
        self.now += min(took, seconds)
        if took > seconds:
            return process.Ended(-2, False, f"{name} was cut")
        if name in self.codes:
            failure = f"FAILED: {name}: as it was told to"
            say(failure)
            return process.Ended(self.codes[name], True, failure, (failure,))
        with pytest.MonkeyPatch.context() as patch:
            for key, value in (environment or {}).items():
                patch.setenv(key, value)
            lines = self._lines(list(command))
        for line in lines:
            say(line)
        failures = tuple(line for line in lines if line.startswith("FAILED"))
        return process.Ended(1 if failures else 0, True, lines[-1] if lines else "", failures)

    def _lines(self, command: list[str]) -> list[str]:
        if command[0] == "ncu":
            Path(command[command.index("--log-file") + 1]).write_text(NCU)
            return ["==PROF== Disconnected"]
        if command[1] == "-c" or command[2] == "pip":
            return ["engine torch: available"]
        if command[2] == "pytest" or not self.real:
            return ["12 passed in 3.00s"]
        printed = io.StringIO()
        module = importlib.import_module(command[2])
        with redirect_stdout(printed):
            module.main(command[3:])
        return printed.getvalue().splitlines()


def name_of(command: Sequence[str]) -> str:
    """The step of a command: "headline" for `rows headline`; for pytest the group of its files."""
    if command[0] == "ncu":
        return "ncu"
    if command[1] == "-c":
        return "engines of fastclip"
    name = command[2].rpartition(".")[2]
    if name == "pytest":
        marks = command[command.index("-m", 3) + 1]
        files = " ".join(command)
        return "sanitizers" if marks == "sanitizer" else (
            "card" if "test_gpu.py" in files else "losses"
        )  # fmt: skip
    return command[3] if name == "rows" else name


def _make_small(patch: pytest.MonkeyPatch) -> None:
    methods = ("fastclip torch", "dense", "siglip_kernel")
    groups = {
        name: (lambda m=16 + 8 * place: [replace(TINY, m=m, n=m, methods=methods, memory=True)])
        for place, name in enumerate(cases.GROUPS)
    }
    groups["again"] = lambda: [
        replace(TINY, methods=("dense", cases.WINNERS), memory=False)
    ]  # fmt: skip
    patch.setattr(cases, "GROUPS", groups)
    patch.setattr("bench.gpu.report.GROUPS", groups)
    patch.setattr(rows, "SECONDS", dict.fromkeys(groups, 0.01))
    patch.setattr(memory, "measure", lambda case, method, device: (1 << 20, ""))
    patch.setattr(runner, "GemmLimit", Limit)
    patch.setattr(smoke_checks, "SHAPES", ((17, 8),))
    patch.setattr(smoke_checks, "SCALES", (14.3, 100.0))
    patch.setattr(smoke, "run_job", _job_in_this_process)
    patch.setattr(rates, "ROUNDS", 1)
    patch.setattr(rates, "SHORTEST", 1e-4)
    patch.setattr(kernels, "SHAPES", (("clip", 32),))
    patch.setattr(kernels, "METHODS", ("fastclip torch", "dense"))
    patch.setattr(kernels, "D", 16)
    patch.setattr(counters, "find", lambda: "ncu")
    patch.setattr(install.torch.version, "cuda", None)
    configurations = Configurations("configurations")
    name = "fastclip.triton_kernels.configurations"
    patch.setitem(sys.modules, name, configurations)
    patch.setattr(fastclip.triton_kernels, "configurations", configurations, raising=False)
    patch.setattr(tiles, "compile_all", lambda device, seconds: None)
    patch.setattr(tiles, "step", tile_step)


def _job_in_this_process(job: tuple[str, str, str], options: Any, path: Path, ends: float) -> None:
    smoke.work(*job, options.device, path, options.winners)
