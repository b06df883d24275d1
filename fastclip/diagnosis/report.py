"""The diagnosis as text: short lines that stay readable when they are pasted."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

WIDTH, INDENT = 100, 13


def text(found: dict[str, Any]) -> str:
    parts = _facts, _engines, _surroundings, _checks, _end
    return "\n\n".join("\n".join(lines) for lines in ([*part(found)] for part in parts) if lines)


def _line(name: str, *parts: object) -> str:
    told = ", ".join(str(part) for part in parts if part)
    return _filled(f"{name:<{INDENT}}{told}", INDENT)


def _filled(line: str, indent: int = 0) -> str:
    return textwrap.fill(
        line, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )


def _facts(found: dict[str, Any]) -> Iterator[str]:
    versions, system, cpu, gpus = (found[k] for k in ("versions", "system", "cpu", "gpus"))
    others = (f"{name} {versions[name] or 'none'}" for name in versions if name != "fastclip")
    yield _line("fastclip", versions["fastclip"], *others)
    yield _line("system", *system.values())
    yield _line(
        "CPU", cpu["model"], f"{cpu['cores']} cores", " ".join(cpu["flags"]),
        f"torch: {cpu['torch_capability']}, {cpu['torch_threads']} threads",
    )  # fmt: skip
    driver = gpus["driver"] and f"driver {gpus['driver']}"
    yield _line("GPU", *(gpus["devices"] or ["none"]), driver)
    yield _line("module", *_module(found["module"]))


def _module(info: dict[str, Any] | None) -> list[str]:
    if info is None:
        return ["none, or it does not load"]
    cuda = info["cuda"]
    return [
        f"built by {info['compiler']} for torch {info['torch']}",
        f"uses {info['capability']} and {info['product']}",
        "bf16 products" if info["bf16_products"] else "no bf16 products",
        f"{info['threads']} threads", "" if info["openmp"] else "WITHOUT OpenMP",
        f"CUDA {cuda['version']} for {' '.join(cuda['architectures'])}" if cuda else "no CUDA",
    ]  # fmt: skip


def _engines(found: dict[str, Any]) -> Iterator[str]:
    for name, told in found["engines"].items():
        yield _line(f"  {name}", told)
    for device, engine in found["defaults"].items():
        yield _line("default", f"{engine} for tensors on {device}")


def _surroundings(found: dict[str, Any]) -> Iterator[str]:
    for name, value in found["variables"].items():
        yield f"{name}={value}"
    if not found["variables"]:
        yield "no environment variable that matters is set"
    for package, host in found["hosts"].items():
        yield f"host {package} {host['version']}: {'known' if host['known'] else 'not known'}"


def _checks(found: dict[str, Any]) -> Iterator[str]:
    form = "{:<7}{:<9}{:<10}{:<16}{:>10}{:>9}{:>8}"
    dense = None
    if found["checks"]:
        yield form.format("loss", "dtype", "engine", "tensors", "ms", "x dense", "error")
    for row in found["checks"]:
        ms, error = row["ms"], row["error"]
        dense = ms if row["engine"] == "dense" else dense
        yield form.format(
            row["loss"], row["dtype"], row["engine"],
            f"{row['device']} {row['shape'][0]} x {row['shape'][1]}",
            f"{ms:.2f}" if ms else "", f"{dense / ms:.2f}" if dense and ms else "",
            "fails" if error is None else f"{error:.0e}",
        )  # fmt: skip


def _end(found: dict[str, Any]) -> Iterator[str]:
    yield from map(_filled, found["advice"])
    for problem in found["wrong"]:
        yield _filled(f"WRONG: {problem}")
    if not found["checks"]:
        yield "verdict: nothing was checked"
    elif found["wrong"]:
        yield "verdict: an engine is WRONG here; please report this text"
    else:
        yield "verdict: every engine that can run here agrees with float64"
