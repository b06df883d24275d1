"""Ranks that run a function together: a gloo group of processes that were made for it.

They are forked from a server that has imported the libraries and run nothing, so that eight of them
start within a second. `f(rank, ranks, *arguments)` must be importable.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

LONGEST = 300.0  # seconds


class Failed(Exception):
    """What a rank raised, or that it died, as text."""


def run(
    function: Callable[..., Any], ranks: int, *arguments: Any, seconds: float = LONGEST
) -> list[Any]:
    """Each rank's result.

    Raises:
        Failed: of the first rank without one; the others, which wait for it, are ended.
    """
    context = _context()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")  # no port that somebody else may have
        processes, connections = [], []
        try:
            for rank in range(ranks):
                mine, theirs = context.Pipe(duplex=False)
                task = (rank, ranks, store, theirs, function, arguments)
                process = context.Process(target=_serve, args=task, daemon=True)
                process.start()
                theirs.close()
                processes.append(process)
                connections.append(mine)
            return _results(connections, time.monotonic() + seconds)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _context() -> Any:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.preload"])
    return context


def _results(connections: list[Connection], deadline: float) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < len(connections):
        waiting = [one for k, one in enumerate(connections) if k not in found]
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            raise Failed("not done in time")
        for one in ready:
            rank = connections.index(one)
            try:
                found[rank] = one.recv()
            except EOFError:
                raise Failed(f"rank {rank} died") from None
            if isinstance(found[rank], Failed):
                raise Failed(f"rank {rank}: {found[rank]}")
    return [found[rank] for rank in range(len(connections))]


def threads_of(ranks: int) -> int:
    """Of each rank; with more ranks than cores they share them."""
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(1, cores // ranks)


def _serve(
    rank: int, ranks: int, store: str, connection: Connection, function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:  # fmt: skip
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this process ends it
    os.environ["OMP_NUM_THREADS"] = str(threads_of(ranks))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(threads_of(ranks))
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
        result = function(rank, ranks, *arguments)
    except Exception as error:
        last = traceback.format_exc().strip().splitlines()[-3:]
        result = Failed(f"{type(error).__name__}: {error} ({' '.join(map(str.strip, last))})")
    connection.send(result)
    threading.Event().wait()  # to be ended when all others are done with its connections, too
