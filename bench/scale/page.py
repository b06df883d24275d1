"""The scale model as text: `python -m bench scale`, its part of docs/benchmarks.md, its picture.

All figures come from `model.py`. Rates that were not measured on a card are called assumptions.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..distributed.row import RESULTS
from ..report import results
from ..report.markdown import duration, markdown, three
from ..report.plot import GRID, INK, TEXT
from ..report.table import between
from . import model
from .model import Cluster, Job

BEGIN, END = "<!-- scale:begin -->", "<!-- scale:end -->"
PICTURE = RESULTS / "scale.png"
ROOM = 80e9  # bytes of a card's memory, without the towers
PAIRS = (1024, 4096)  # the page's pairs per rank
RANKS = (8, 64, 512, 4096)
METHODS = {
    "open_clip": (model.open_clip_seconds, model.open_clip_bytes),
    "all-gather": (model.gathered_seconds, model.gathered_bytes),
    "ring": (model.ring_seconds, model.ring_bytes),
}
DRAWN = [1 << power for power in range(3, 13)]  # GPUs
STYLES = {"open_clip": "#d1495b", "all-gather": "#00798c", "ring": "#edae49"}


def rate_of_a_card(paths: Iterable[Path]) -> tuple[float, str] | None:
    """FLOP/s of CLIP's matmuls in bf16 on the largest batch in a card's CSV, and the card."""
    found: list[results.Row] = []
    for path in paths:
        if not results.holds(path, results.Row):
            continue
        found += [
            row for row in results.read(path)
            if row.on_gpu and row.gflops is not None and row.mode == "both"
            and (row.loss, row.method, row.dtype) == ("clip", "fastclip", "bfloat16")
        ]  # fmt: skip
    if not found:
        return None
    row = max(found, key=lambda row: row.m * row.n)
    return 1e9 * row.gflops, row.cpu


def cluster_of(paths: Iterable[Path]) -> tuple[Cluster, str]:
    """A cluster with a card's measured rate, or the assumed one, and a text that says which."""
    if (measured := rate_of_a_card(paths)) is None:
        net = Cluster()
        return net, f"{net.flops / 1e12:.0f} TFLOP/s of a GPU's products (assumed, not measured)"
    rate, card = measured
    return replace(Cluster(), flops=rate), (
        f"{rate / 1e12:.0f} TFLOP/s of a GPU's products (measured on one {card})"
    )


def assumptions(net: Cluster, source: str, d: int, itemsize: int) -> str:
    return (
        f"{source}, {net.gemm / 1e12:.0f} of open_clip's bare ones, {net.memory / 1e12:.3g} TB/s "
        f"of memory for its logits; nodes of {net.node} GPUs, {net.within / 1e9:.0f} GB/s within, "
        f"{net.across / 1e9:.0f} GB/s a GPU across, {net.latency * 1e6:.0f} us an exchange "
        f"(assumed); D = {d}, {itemsize} bytes a feature."
    )


def table_of(
    net: Cluster, pairs: Iterable[int] = PAIRS, ranks: Iterable[int] = RANKS, **job: int
) -> str:
    """Time of a step and memory beyond the inputs, in one row for each b and R."""
    header = ["b a GPU", "GPUs", "pairs", *METHODS, *(f"GB, {name}" for name in METHODS)]
    table_rows = []
    for b in pairs:
        for count in ranks:
            one = Job(count, b, **job)
            seconds = [predict(one, net) for predict, _ in METHODS.values()]
            sizes = [held(one) for _, held in METHODS.values()]
            table_rows.append(
                [
                    str(b), str(count), _count(one.batch),
                    *(duration(1e3 * value) for value in seconds),
                    *(three(size / 1e9) + (" (no)" if size > ROOM else "") for size in sizes),
                ]
            )  # fmt: skip
    return markdown(header, table_rows)


def crossovers(net: Cluster, **job: int) -> str:
    """States from which b the ring is faster, and up to which batch each method fits."""
    many = RANKS[-1]
    itemsize = Job(1, 1, **job).itemsize
    b = PAIRS[-1]
    fits = {
        name: _count(model.most_pairs(ROOM, held, b, **job)) for name, (_, held) in METHODS.items()
    }
    from_b = model.faster_from(many, net, **job)
    faster = "never" if from_b is None else f"from b = {from_b} on"
    return (
        f"On {many} GPUs the ring is faster {faster}, and waits for no exchange from b = "
        f"{model.hidden_from(net, itemsize)} on; within a node of {net.node}, from b = "
        f"{model.faster_from(net.node, net, **job)} on. At b = {b} {ROOM / 1e9:.0f} GB hold "
        f"{fits['open_clip']} pairs of open_clip's local loss, {fits['all-gather']} gathered, "
        f"{fits['ring']} in a ring."
    )


def _count(pairs: int) -> str:
    for size, unit in ((1 << 20, "M"), (1 << 10, "K")):
        if pairs >= size:
            return f"{three(pairs / size)}{unit}".replace(".00", "").replace(".0", "")
    return str(pairs)


def page(paths: Iterable[Path]) -> str:
    """The text between the page's markers."""
    net, source = cluster_of(paths)
    job = Job(1, 1)
    parts = [
        f"Assumptions: {assumptions(net, source, job.d, job.itemsize)}",
        crossovers(net),
        table_of(net) + "\n\n(no): beyond 80 GB.",
    ]
    if PICTURE.exists():
        parts.append(
            f"![Time and memory against the number of GPUs](../bench/results/distributed/"
            f"{PICTURE.name})"
        )
    return "\n\n".join(parts)


def into_page(page_file: Path, paths: Iterable[Path]) -> None:
    """Replaces the text between the markers."""
    page_file.write_text(between(page_file, BEGIN, END, page(paths)))


def draw(paths: Iterable[Path], path: Path = PICTURE) -> Path:
    """Draws time above memory, against the number of GPUs, for each b of the page."""
    net, source = cluster_of(paths)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(TEXT):
        figure, axes = plt.subplots(2, len(PAIRS), figsize=(10.5, 8), sharex="col", sharey="row")
        for column, b in enumerate(PAIRS):
            jobs = [Job(count, b) for count in DRAWN]
            for name, (predict, held) in METHODS.items():
                for axis, values in (
                    (axes[0, column], [1e3 * predict(one, net) for one in jobs]),
                    (axes[1, column], [held(one) / 1e9 for one in jobs]),
                ):
                    axis.plot(
                        DRAWN, values, color=STYLES[name], label=name, marker="o", markersize=4,
                        linewidth=2 if name != "open_clip" else 1.5,
                    )  # fmt: skip
            _mark_times(axes[0, column], jobs, net)
            _mark_memory(axes[1, column], b)
            axes[0, column].set_title(f"b = {b} a GPU", fontweight="bold", loc="left")
            axes[1, column].set_xlabel("GPUs")
            for axis in axes[:, column]:
                _dress(axis, DRAWN)
        axes[0, 0].set_ylabel("step, forward and backward, ms")
        axes[1, 0].set_ylabel("memory beyond the inputs, GB")
        job = Job(1, 1)
        text = f"A model, not a measurement: {source}; D = {job.d}, {job.itemsize} bytes a feature"
        figure.suptitle(text, x=0.06, ha="left", fontsize=10)
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="lower center", ncols=len(names), frameon=False)
        figure.tight_layout(rect=(0, 0.035, 1, 0.985))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=140)
        plt.close(figure)
    return path


def _mark_times(axis: Any, jobs: list[Job], net: Cluster) -> None:
    """Marks the numbers of GPUs at which the faster of all-gather and ring changes."""
    before = None
    for one in jobs:
        faster = model.ring_seconds(one, net) < model.gathered_seconds(one, net)
        if before is not None and faster != before:
            axis.axvline(one.ranks / 2**0.5, color=INK, linewidth=0.8, linestyle=":")
            text = "ring faster from here" if faster else "all-gather faster from here"
            axis.annotate(
                text, (one.ranks / 2**0.5, 0.03), xycoords=("data", "axes fraction"), fontsize=8,
                rotation=90, va="bottom", ha="left",
            )  # fmt: skip
        before = faster
    if all(line.get_linestyle() != ":" for line in axis.lines):
        text = "ring faster throughout" if before else "all-gather faster throughout"
        axis.annotate(text, (0.03, 0.95), xycoords="axes fraction", fontsize=8, va="top")


def _mark_memory(axis: Any, b: int) -> None:
    axis.axhline(ROOM / 1e9, color=INK, linewidth=0.8, linestyle="--")
    axis.annotate("80 GB", (8, ROOM / 1e9), fontsize=8, va="bottom")
    most = model.most_pairs(ROOM, model.gathered_bytes, b) // b
    if most > DRAWN[-1]:
        return
    axis.axvline(most, color=INK, linewidth=0.8, linestyle=":")
    axis.annotate(
        "beyond: ring alone", (most, 0.03), xycoords=("data", "axes fraction"), fontsize=8,
        rotation=90, va="bottom", ha="right",
    )  # fmt: skip


def _dress(axis: Any, ranks: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlim(ranks[0] / 1.2, ranks[-1] * 1.2)
    axis.set_xticks(ranks[::3], [str(count) for count in ranks[::3]])
    axis.grid(True, which="major", color=GRID, linewidth=0.8)
    axis.tick_params(which="both", length=0)
    axis.spines[["top", "right"]].set_visible(False)


def main(arguments: list[str], paths: Iterable[Path]) -> int:
    """Prints the page's text for the assumptions that the arguments give."""
    net, source = cluster_of(paths)
    parser = argparse.ArgumentParser(prog="python -m bench scale", description=__doc__)
    add = parser.add_argument
    add("--tflops", type=float, help="rate of the loss's matmuls, TFLOP/s per GPU")
    add("--gemm", type=float, default=net.gemm / 1e12, help="rate of bare matmuls, TFLOP/s")
    add("--memory", type=float, default=net.memory / 1e12, help="memory bandwidth, TB/s")
    add("--within", type=float, default=net.within / 1e9, help="GB/s per GPU within a node")
    add("--across", type=float, default=net.across / 1e9, help="GB/s per GPU between nodes")
    add("--node", type=int, default=net.node, help="GPUs per node")
    add("--latency", type=float, default=net.latency * 1e6, help="latency of an exchange, us")
    add("--pairs", type=int, nargs="+", default=PAIRS, help="pairs per GPU")
    add("--gpus", type=int, nargs="+", default=RANKS, help="numbers of GPUs")
    add("-d", type=int, default=1024, help="width of the features")
    add("--bytes", type=int, default=2, help="bytes per feature element")
    given = parser.parse_args(arguments)
    if given.tflops:
        source = f"{given.tflops:g} TFLOP/s of a GPU's products (as given)"
    net = Cluster(
        1e12 * given.tflops if given.tflops else net.flops, 1e12 * given.gemm, 1e12 * given.memory,
        1e9 * given.within, 1e9 * given.across, given.node, 1e-6 * given.latency,
    )  # fmt: skip
    job = {"d": given.d, "itemsize": given.bytes}
    print(assumptions(net, source, **job), crossovers(net, **job), sep="\n\n", end="\n\n")
    print(table_of(net, given.pairs, given.gpus, **job))
    return 0
