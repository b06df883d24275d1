"""The goals on CPUs with AVX-512. Each is the worst figure among its cases, at each scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from ..losses import LOSSES
from .goal import Figure, Goal, pick, worst_of
from .markdown import error, mebibytes, percent, times
from .results import Row, of_losses

# An error of the dense loss counts as at least this: a float32 result's own rounding.
FLOAT32_EPS = 2.0**-23
GRADIENTS = ("err_dx", "err_dy", "err_dscale")


def _least(
    column: str, sizes: tuple[int, ...], method: str = "fastclip", **wanted: object
) -> Figure:
    """The minimum of `column` over square cases with D = 512; None if a case is missing."""

    def figure(rows: list[Row]) -> float | None:
        chosen = [pick(rows, method, m=n, n=n, d=512, **wanted) for n in sizes]
        if not all(chosen):
            return None
        return worst_of((getattr(row, column) for some in chosen for row in some), min)

    return figure


def _fraction_of_rectangle(method: str) -> Figure:
    def figure(rows: list[Row]) -> float | None:
        chosen = pick(rows, method, m=256, n=32768, d=512, dtype="float32")
        return worst_of((row.fraction for row in chosen), min)

    return figure


def _rest(half: bool) -> Figure:
    """The most MiB beyond inputs, gradients and budget. If the inputs are of half precision, the
    MiB of one (N, D) matrix in fp32 are not counted."""

    def figure(rows: list[Row]) -> float | None:
        found = []
        for row in of_losses(pick(rows, "fastclip"), LOSSES):
            if (row.dtype != "float32") == half and row.rest_mib is not None:
                allowed = 4 * row.n * row.d / 2**20 if half else 0.0
                found.append(max(0.0, row.rest_mib - allowed))
        return worst_of(found, max)

    return figure


def _error(rows: list[Row]) -> float | None:
    """The largest gradient error of CLIP on separated pairs."""
    chosen = pick(rows, "fastclip", loss="clip", dtype="float32", data="separated")
    return worst_of((getattr(row, name) for row in chosen for name in GRADIENTS), max)


def _error_over_dense(**wanted: object) -> Figure:
    """Our gradient errors over the dense loss's, the largest of dx, dy and dscale.

    Errors are root mean squares over the cases, because dscale is a single number and either
    method may be almost exact by luck.
    """

    def figure(rows: list[Row]) -> float | None:
        pairs = []
        for own in pick(rows, "fastclip", **wanted):
            key = {name: getattr(own, name) for name in ("m", "n", "d", "dtype", "loss")}
            pairs += [(own, dense) for dense in pick(rows, "dense", **key)]
        return worst_of((_ratio_of_rms(pairs, name) for name in GRADIENTS), max)

    return figure


def _ratio_of_rms(pairs: list[tuple[Row, Row]], name: str) -> float | None:
    errors = [(getattr(own, name), getattr(dense, name)) for own, dense in pairs]
    known = [(own, dense) for own, dense in errors if own is not None and dense is not None]
    if not known:
        return None
    return math.hypot(*(own for own, _ in known)) / math.hypot(
        *(max(dense, FLOAT32_EPS) for _, dense in known)
    )


def _seconds(rows: list[Row]) -> float | None:
    chosen = pick(rows, "fastclip", loss="clip", m=65536, n=65536, d=512, dtype="float32")
    return worst_of((row.ms / 1e3 for row in chosen if row.ms is not None), max)


def _of_each(
    sizes: tuple[int, ...],
    what: str,
    column: str,
    floor: float,
    aim: float,
    form: Callable[[float], str],
) -> Iterator[Goal]:
    """One goal for each loss: the minimum of `column` in float32."""
    for loss, known in LOSSES.items():
        text = f"{known.label} float32, N = {', '.join(map(str, sizes))}: {what}"
        figure = _least(column, sizes, loss=loss, dtype="float32")
        yield Goal(text, figure, floor, (aim, aim), form)


def _goals() -> list[Goal]:
    large = (8192,)
    made = [
        Goal(
            "CLIP float32, N = 8192: faster than open_clip",
            _least("over_open_clip", large, loss="clip", dtype="float32"), 2, (3, 3), times,
        ),
        Goal(
            "CLIP float32, N = 8192: faster than torch.compile",
            _least("over_compiled", large, loss="clip", dtype="float32"), 1.1, (1.5, 1.5), times,
        ),
        Goal(
            "CLIP bfloat16, N = 8192: faster than open_clip",
            _least("over_open_clip", large, loss="clip", dtype="bfloat16"), 1.7, (2.5, 2.5), times,
        ),
        Goal(
            "SigLIP float32, N = 8192: faster than open_clip",
            _least("over_open_clip", large, loss="siglip", dtype="float32"), 1.6, (2, 2), times,
        ),
    ]  # fmt: skip
    near = (8191, 8192, 8193)
    made += _of_each(near, "of the GEMM limit", "fraction", 0.8, 0.95, percent)
    # Kept products save a fifth of the time but cost memory traffic. If every product is recomputed
    # the loss is slower and closer to the GEMM limit of its passes.
    recomputing = "fastclip budget=0"
    text = "the same, CLIP, every product recomputed"
    figure = _least("fraction", near, recomputing, loss="clip", dtype="float32")
    made.append(Goal(text, figure, 0.8, (0.95, 0.95), percent))
    text = "CLIP float32, 256 x 32768: of the GEMM limit"
    made.append(Goal(text, _fraction_of_rectangle("fastclip"), 0.7, (0.9, 0.9), percent))
    text = "the same, every product recomputed"
    made.append(Goal(text, _fraction_of_rectangle(recomputing), 0.7, (0.9, 0.9), percent))
    small = (32, 128, 512)
    made += _of_each(small, "faster than open_clip", "over_open_clip", 1.0, 1.3, times)
    for loss, known in LOSSES.items():
        text = f"{known.label} float32: rms of gradient errors over the dense loss's"
        figure = _error_over_dense(dtype="float32", loss=loss)
        made.append(Goal(text, figure, 1.1, (0.5, 1.1), times, at_most=True))
        text = f"{known.label} bfloat16 autocast: rms of gradient errors over the dense loss's"
        figure = _error_over_dense(dtype="autocast", loss=loss)
        made.append(Goal(text, figure, 1.0, (1 / 3, 1 / 3), times, at_most=True))
    text = "CLIP float32, separated pairs: gradient errors"
    made.append(Goal(text, _error, 1e-5, (3e-6, 3e-6), error, at_most=True))
    for half, name in ((False, "float32"), (True, "bfloat16")):
        text = f"{name}, every N measured: MiB beyond inputs, gradients, budget"
        made.append(Goal(text, _rest(half), 128, (64, 64), mebibytes, at_most=True))
    text = "CLIP float32, N = 65536: seconds"
    made.append(Goal(text, _seconds, 600, (100, 100), "{:.0f}".format, at_most=True))
    return made


CPU_GOALS = _goals()
