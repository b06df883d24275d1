"""Measures a plan case by case and writes each finished case into the CSV.

All methods of a case are timed in interleaved runs in this process. Errors come from one run of
each method, and peak memory on a CPU from one process for each. A method that fails gets a row with
the reason.
"""

from __future__ import annotations

import contextlib
import gc
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path

import torch

from ..case import Case, Inputs
from ..cases import LARGEST_TRUTH, make_inputs
from ..losses import Swept, loss_of
from ..methods.passes import gradient_bytes, kept_bytes
from ..methods.registry import METHODS, Unavailable
from ..methods.step import Step, make_step
from ..report import results
from ..report.results import Row
from . import memory, progress
from .timing import CLOCKS, GemmLimit, Timing, interleaved, wait_for
from .truth import Truth, relative_error

MIB = 2**20
SECOND_WARM_UP_BELOW = 1.0  # seconds
# The prefix of a row's note if no later process should try the method again.
LOST_NOTE = "device lost: "


class DeviceLost(Exception):
    """A kernel's failure has made the device unusable for this process. The rows are saved."""


@dataclass
class Options:
    """How a plan is run: each case is timed for `seconds`; none begins after `at_most` seconds.

    If a method's first calls take longer than `patience`, its row says that the device is lost, and
    `give_up` ends the process, because nothing else stops a kernel that hangs.
    """

    path: Path
    seconds: float = 6.0
    device: str = "cpu"
    memory: bool = True
    errors: bool = True
    at_most: float = math.inf
    patience: float = math.inf
    give_up: Callable[[], object] = lambda: None


@dataclass
class Run:
    """The data that the cases of one run share."""

    options: Options
    where: Row
    limits: dict[bool, GemmLimit] = field(default_factory=dict)
    truths: dict[tuple[object, ...], Truth] = field(default_factory=dict)
    peaks: dict[tuple[object, ...], tuple[int | None, str]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def run(plan: list[Case], options: Options) -> list[Row]:
    """Measures every case of `plan`; returns the new rows, which are also in the CSV."""
    torch.manual_seed(0)
    shared = Run(options, results.machine_row(options.device))
    old = results.read(options.path) if options.path.exists() else []
    rows: list[Row] = []
    total = sum(len(case.methods) for case in plan)
    began = time.monotonic()
    with progress.bar(total) as bar:
        for case in plan:
            if time.monotonic() - began > options.at_most:
                bar.write(f"left out for time: {case.name}")
                continue
            bar.set_description(case.name)

            def tell(method: str, doing: str) -> None:
                bar.set_postfix_str(f"{doing} {method}")

            def keep(found: list[Row], before: tuple[Row, ...] = tuple(rows)) -> None:
                done = [*before, *found]
                done += _skipped_rows(shared, done)
                results.write(options.path, results.merge(old, done))

            rows += measure_case(case, shared, tell, keep)
            bar.update(len(case.methods))
            gc.collect()
    return rows + _skipped_rows(shared, rows)


def measure_case(
    case: Case, shared: Run, tell: Callable[[str, str], None], keep: Callable[[list[Row]], None]
) -> list[Row]:
    """The rows of one case, one for each method that can run here. `keep` gets all rows so far
    whenever they change.

    Raises:
        DeviceLost: after `keep` got the rows; the last is that of the method that failed.
    """
    options = shared.options
    inputs = make_inputs(case, options.device)
    steps: dict[str, Step] = {}
    rows: dict[str, Row] = {}
    for method in case.methods:
        tell(method, "warming up")

        def hung(method: str = method) -> None:
            note = f"{LOST_NOTE}no answer within {options.patience:g} s"
            lost = replace(_blank(case, method, shared), note=note)
            keep(list({**rows, method: lost}.values()))
            options.give_up()

        try:
            with _watched(options.patience, hung):
                step = make_step(case, method, inputs)
        except (Unavailable, ImportError) as error:
            shared.skipped[method] = str(error)
            continue
        except Exception as error:  # a step that no CUDA graph can capture
            rows[method] = _failed(case, method, shared, error)
            _go_on_if_alive(options.device, rows, keep, method)
            continue
        rows[method] = row = _blank(case, method, shared)
        if not case.timed:
            continue
        try:
            with _watched(options.patience, hung):
                value = _warm_up(step, options.device)
            if options.errors and case.m * case.n <= LARGEST_TRUTH[options.device] ** 2:
                tell(method, "error of")
                peer = loss_of(case.loss).peers.get(method)
                comparable = value[:1] if peer is not None and peer.normalises else value
                _set_errors(row, comparable, _truth(case, inputs, shared))
            steps[method] = step
        except Exception as error:  # a method's failure is a result and does not end the run
            rows[method] = _failed(case, method, shared, error)
            _go_on_if_alive(options.device, rows, keep, method)
        value = None
    if steps:
        tell(f"{len(steps)} methods", "timing")
        try:
            _set_times(case, steps, rows, shared)
        except Exception as error:  # in a round: it is unknown which method failed
            for method in steps:
                rows[method] = _failed(case, method, shared, error)
            _go_on_if_alive(options.device, rows, keep)
    keep(list(rows.values()))
    del inputs, steps  # before other processes need the memory
    gc.collect()
    if options.memory and case.memory:
        for method, row in rows.items():
            tell(method, "memory of")
            _set_memory(case, method, row, shared)
        keep(list(rows.values()))
    return list(rows.values())


@contextlib.contextmanager
def _watched(seconds: float, hung: Callable[[], None]) -> Iterator[None]:
    """Calls `hung`, in a thread of its own, if the body takes longer than `seconds`."""
    if math.isinf(seconds):
        yield
        return
    timer = threading.Timer(seconds, hung)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _failed(case: Case, method: str, shared: Run, error: Exception) -> Row:
    note = f"{type(error).__name__}: {_first_line(error)}"[:200]
    return replace(_blank(case, method, shared), note=note)


def _go_on_if_alive(
    device: str, rows: dict[str, Row], keep: Callable[[list[Row]], None], culprit: str = ""
) -> None:
    """Returns if the device still works, with its cache emptied for the methods to come.

    After a kernel's failure every CUDA call fails, and later methods would be blamed for it: then
    the row of `culprit` is marked as lost, `keep` gets the rows, and DeviceLost is raised.
    """
    gc.collect()
    try:
        wait_for(device)
        if device == "cuda":
            torch.cuda.empty_cache()
    except RuntimeError as error:
        if culprit:
            rows[culprit].note = f"{LOST_NOTE}{rows[culprit].note}"[:200]
        keep(list(rows.values()))
        raise DeviceLost(_first_line(error)) from error


def _blank(case: Case, method: str, shared: Run) -> Row:
    return replace(
        shared.where,
        when=_now(), loss=case.loss, m=case.m, n=case.n, d=case.d, dtype=case.dtype, data=case.data,
        scale=case.scale, mode=case.mode, method=method,
        passes=METHODS[method].passes(case, shared.options.device),
    )  # fmt: skip


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")


def _warm_up(step: Step, device: str) -> tuple[torch.Tensor | None, ...]:
    began = time.perf_counter()
    value = step()
    wait_for(device)
    if time.perf_counter() - began < SECOND_WARM_UP_BELOW:
        value = step()
        wait_for(device)
    return value


def _truth(case: Case, inputs: Inputs, shared: Run) -> Truth:
    """The truth for the features as the matmuls receive them: under autocast, in bfloat16."""
    rounded = torch.bfloat16 if case.half else torch.float32
    key = (case.loss, case.m, case.n, case.d, case.data, case.scale, rounded)
    if key not in shared.truths:
        shared.truths.clear()  # large, and only neighbours in the plan share one
        x, y = (None if t is None else t.detach().to(rounded) for t in (inputs.x, inputs.y))
        loss = loss_of(case.loss)
        shared.truths[key] = loss.call(loss.truth, replace(inputs, x=x, y=y))
    return shared.truths[key]


def _set_errors(row: Row, value: tuple[torch.Tensor | None, ...], true: Truth) -> None:
    pairs = zip(
        ("err_loss", "err_dx", "err_dy", "err_dscale"),
        value,
        (true.loss, true.dx, true.dy, true.dscale),
        strict=False,  # a forward alone has no gradients; some losses also have one for the bias
    )
    for name, got, expected in pairs:
        if got is not None:
            setattr(row, name, relative_error(got, expected))


def _set_times(case: Case, steps: dict[str, Step], rows: dict[str, Row], shared: Run) -> None:
    device = shared.options.device
    if case.half not in shared.limits:
        shared.limits[case.half] = GemmLimit(case.half, device)
    limit = shared.limits[case.half]
    times = interleaved(steps, shared.options.seconds, limit.sample, CLOCKS[device])
    rate = limit.take()
    for method, timing in times.items():
        _set_time(rows[method], timing, times)
        row = rows[method]
        row.gflops = row.passes * case.pass_flops / timing.median / 1e9
        row.limit, row.limit_of, row.fraction = rate, limit.source, row.gflops / rate
        if case.mode == "both" and _takes_four(case):
            row.fraction_of_4 = row.fraction * 4 / row.passes


def _takes_four(case: Case) -> bool:
    """True if two sweeps take four passes without kept products."""
    loss = loss_of(case.loss)
    return loss.swept(case.m, case.n, "cpu") == [Swept(case.m, case.n)] and not loss.in_one_go


def _set_time(row: Row, timing: Timing, times: dict[str, Timing]) -> None:
    row.ms, row.low_ms, row.high_ms = (
        1e3 * seconds for seconds in (timing.median, timing.low, timing.high)
    )
    row.rounds = timing.rounds
    for rival in ("dense", "open_clip", "compiled"):
        if rival in times:
            setattr(row, f"over_{rival}", times[rival].median / timing.median)


def _set_memory(case: Case, method: str, row: Row, shared: Run) -> None:
    """Measures memory once for all scales, since no allocation depends on the scale."""
    key = (case.loss, case.m, case.n, case.d, case.dtype, case.mode, method)
    if key not in shared.peaks:
        shared.peaks[key] = memory.measure(case, method, shared.options.device)
    peak, reason = shared.peaks[key]
    row.note = row.note or reason
    if peak is None:
        return
    kept = kept_bytes(case, method, shared.options.device)
    row.peak_mib, row.gradients_mib, row.budget_mib = (
        size / MIB for size in (peak, gradient_bytes(case), kept)
    )
    row.rest_mib = max(0.0, row.peak_mib - row.gradients_mib - row.budget_mib)


def _skipped_rows(shared: Run, rows: list[Row]) -> list[Row]:
    """One row, with the reason, for each method that could run on no case."""
    ran = {row.method for row in rows}
    return [
        replace(shared.where, when=_now(), mode="skipped", method=method, note=reason)
        for method, reason in shared.skipped.items()
        if method not in ran
    ]
