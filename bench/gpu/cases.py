"""The cases of `make gpu`, in groups. The most important come first, because a run may be cut."""

from __future__ import annotations

from dataclasses import replace

from ..cases import CONTRAST, PEERS, SCALES, Case
from ..losses import LOSSES

TRITON = ("fastclip triton", "fastclip triton kept")
CUDA = ("fastclip cuda", "fastclip cuda kept")
OWN = ("fastclip", *TRITON, *CUDA)
LARGE = (32768, 65536)
WINNERS = "fastclip triton winners"
SPLIT = "fastclip triton split"


def headline() -> list[Case]:
    """Large batches in bf16. Rivals follow our own methods: they are slower, and may fail.

    Times of peers and of the compiled loss do not depend on the scale.
    """
    cases = []
    first, *others = LOSSES
    # The other losses have a goal for the larger batch, which therefore comes first.
    order = [(first, n) for n in LARGE] + [(loss, n) for loss in others for n in LARGE[::-1]]
    for scale in SCALES:
        for loss, n in order:
            methods = (*OWN, "open_clip")
            if scale == SCALES[0]:
                methods += (*PEERS, *(("compiled",) if n == 32768 else ()))
            case = Case(loss, n, n, 768, "bfloat16", scale, methods=methods, memory=True)
            cases.append(case)
    return cases


def engines() -> list[Case]:
    """The CUDA engine's own tensor-core kernels, for comparison with the headline; and fp32: IEEE
    products, for which that engine is the default, and Triton's products of bf16 parts."""
    cases = [
        Case(loss, 32768, 32768, 768, "bfloat16", scale, methods=("fastclip cuda fused",))
        for scale in SCALES
        for loss in LOSSES
    ]
    fp32 = ("fastclip", "fastclip triton", SPLIT, "fastclip cuda", "dense", "open_clip")
    cases += [
        Case("clip", 16384, 16384, 768, "float32", scale, methods=fp32, memory=True)
        for scale in SCALES
    ]
    return cases


def contrast() -> list[Case]:
    """The losses written on `fastclip.contrast`, plain, with ids and with a margin."""
    return [
        Case(loss, 32768, 32768, 768, "bfloat16", SCALES[0], methods=("fastclip", *CONTRAST))
        for loss in LOSSES
    ]


def small() -> list[Case]:
    """Batches limited by launches, not by arithmetic: eager, and captured in a CUDA graph."""
    methods = ("open_clip", "dense", "fastclip", "fastclip triton", "fastclip cuda")
    return [
        Case(loss, n, n, 512, "bfloat16", SCALES[0], mode=mode, methods=methods)
        for n in (256, 512, 1024, 2048)
        for loss in LOSSES
        for mode in ("both", "graph")
    ]


def rest() -> list[Case]:
    """Sizes small enough for a float64 truth, without those of `small`; then a million pairs."""
    cases = []
    everything = ("fastclip", "fastclip triton", "fastclip cuda", "dense", "open_clip")
    for n in (8192, 2048):
        for dtype in ("bfloat16", "float32"):
            methods = (*everything, SPLIT) if dtype == "float32" else everything
            methods += CONTRAST if n == 8192 else ()
            for loss in LOSSES:
                case = Case(loss, n, n, 512, dtype, SCALES[0], methods=methods, memory=True)
                cases += [replace(case, scale=scale) for scale in SCALES]
    known = {case.name for case in small()}
    million = 1 << 20
    last = Case("clip", million, million, 512, "bfloat16", SCALES[0], methods=("fastclip",))
    return [*(case for case in cases if case.name not in known), last]


def again() -> list[Case]:
    """The headline with the tiles that won in the first run, and with the table's."""
    methods = ("fastclip triton", WINNERS, "open_clip")
    return [replace(case, methods=methods, memory=False) for case in headline()]


GROUPS = {
    "headline": headline,
    "engines": engines,
    "contrast": contrast,
    "small": small,
    "rest": rest,
    "again": again,
}
