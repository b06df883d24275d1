"""The goals on GPUs. Each is the worst figure among its cases, at each scale.

Ratios within one run hold on any card. Milliseconds are set for an H100 and for an H200, and count
only rows that were measured on that card.
"""

from __future__ import annotations

from collections.abc import Callable

from ..losses import LOSSES, loss_of
from .goal import Figure, Goal, pick, worst_of
from .markdown import mebibytes, percent, times
from .results import Row


def _of(
    column: str, loss: str, n: int, d: int, worst: Callable[..., float], **wanted: str
) -> Figure:
    def figure(rows: list[Row]) -> float | None:
        chosen = pick(rows, "fastclip", loss=loss, m=n, n=n, d=d, dtype="bfloat16", **wanted)
        return worst_of((getattr(row, column) for row in chosen), worst)

    return figure


def _on(card: str, figure: Figure) -> Figure:
    """The figure of only the rows that were measured on that card."""
    return lambda rows: figure([row for row in rows if card in row.cpu])


def _time(card: str, loss: str, n: int, d: int, floor: float, aim: float) -> Goal:
    text = f"{loss_of(loss).label} bfloat16, {n} x {d}, {card}: milliseconds"
    figure = _on(card, _of("ms", loss, n, d, max))
    return Goal(text, figure, floor, (aim, aim), "{:.3g}".format, at_most=True)


def _over_compiled(card: str, floor: float, aim: float) -> Goal:
    text = f"CLIP bfloat16, 32768 x 768, {card}: faster than torch.compile"
    figure = _on(card, _of("over_compiled", "clip", 32768, 768, min))
    return Goal(text, figure, floor, (aim, aim), times)


def _fp32_over_dense(rows: list[Row]) -> float | None:
    """The faster of the default engine and of products in parts of bfloat16; both are as
    accurate as the dense loss."""
    wanted = dict(loss="clip", m=16384, n=16384, d=768, dtype="float32")
    every = [pick(rows, method, **wanted) for method in ("fastclip", "fastclip triton split")]
    found = [worst_of((row.over_dense for row in chosen), min) for chosen in every]
    return max((one for one in found if one is not None), default=None)


def _small(loss: str, mode: str, floor: float) -> Goal:
    """The minimum over sizes at which a step waits for launches; None if a size is missing."""
    sizes = (256, 512, 1024, 2048)

    def figure(rows: list[Row]) -> float | None:
        found = [_of("over_open_clip", loss, n, 512, min, mode=mode)(rows) for n in sizes]
        return None if None in found else min(found)

    how = " in a CUDA graph" if mode == "graph" else ""
    text = f"{loss_of(loss).label} bfloat16, N = 256 .. 2048{how}: faster than open_clip"
    return Goal(text, figure, floor, (1.5, 1.5), times)


def _memory_over_compiled(rows: list[Row]) -> float | None:
    """Peak memory of fastclip over that of the compiled dense loss, at N = 32,768."""
    wanted = dict(loss="clip", m=32768, n=32768, d=768, dtype="bfloat16")
    own, dense = (pick(rows, method, **wanted) for method in ("fastclip", "compiled"))
    if not own or not dense or own[0].peak_mib is None or not dense[0].peak_mib:
        return None
    return own[0].peak_mib / dense[0].peak_mib


_MILLION = 1 << 20
_OF_CARDS = [
    _time("H100", "clip", 32768, 768, 12, 9.4),
    _time("H100", "clip", 65536, 768, 48, 38),
    _time("H100", "siglip", 65536, 768, 40, 30),
    _over_compiled("H100", 1.0, 1.3),
    _time("H200", "clip", 32768, 768, 12, 10),
    _time("H200", "clip", 65536, 768, 48, 40),
    _time("H200", "siglip", 65536, 768, 40, 30),
    # Any time reaches the floor: the goal is that it runs.
    _time("H200", "clip", _MILLION, 512, float("inf"), 7000),
    _over_compiled("H200", 0.9, 1.1),
]
_RATIOS = [
    Goal(
        "CLIP bfloat16, 32768 x 768: faster than open_clip",
        _of("over_open_clip", "clip", 32768, 768, min), 1.5, (2.5, 2.5), times,
    ),
    Goal(
        "CLIP float32 or split, 16384 x 768: faster than the dense loss", _fp32_over_dense, 1.5,
        (2.5, 2.5), times,
    ),
    Goal(
        "CLIP bfloat16, 32768 x 768: memory over torch.compile's", _memory_over_compiled,
        0.1, (0.1, 0.1), percent, at_most=True,
    ),
    Goal(
        "CLIP bfloat16, 65536 x 768: MiB beyond the inputs",
        _of("peak_mib", "clip", 65536, 768, max), 2e9 / 2**20, (1e9 / 2**20,) * 2, mebibytes,
        at_most=True,
    ),
    *(
        Goal(
            f"{loss_of(loss).label} bfloat16, {n} x 768: of the GEMM limit",
            _of("fraction", loss, n, 768, min), 0.7, (0.85, 0.85), percent,
        )
        for loss in LOSSES
        for n in (32768, 65536)
    ),
    *(_small(loss, mode, 1.0) for loss in LOSSES for mode in ("both", "graph")),
]  # fmt: skip

GPU_GOALS = [*_OF_CARDS, *_RATIOS]
