"""Runs a function on several ranks: a gloo group of processes that are started for it.

They are forked from a server that has imported the libraries and run nothing else, so that eight of
them start within a second. The function, `f(rank, ranks, *arguments)`, must be importable.
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
    """A rank raised an error, died or was not done in time; the text says which."""


def run(
    function: Callable[..., Any], ranks: int, *arguments: Any, seconds: float = LONGEST
) -> list[Any]:
    """The results of all ranks.

    Raises:
        Failed: for the first rank that has no result; the others are then killed.
    """
    context = _context()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")  # a file: a port might be in use
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
    """The threads of each rank; at least one, even with more ranks than cores."""
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(1, cores // ranks)


def _serve(
    rank: int, ranks: int, store: str, connection: Connection, function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:  # fmt: skip
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process ends this one
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
    threading.Event().wait()  # until killed: other ranks may still use connections to this one
