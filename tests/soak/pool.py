"""Processes that run a soak's functions together as ranks of gloo groups.

They are forked from a server that has imported torch and the soak, so that a pool starts in about
a second. A group of fewer ranks holds the first ones.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from soak.meter import return_freed_memory


class Outcome(NamedTuple):
    """A rank's result, or its error, and the seconds that it took."""

    result: Any
    error: str  # "" without one; "died" and "hangs" if the process does not answer
    seconds: float


class Pool:
    """`ranks` processes. seconds: the timeout of their groups. smaller: they form groups of fewer
    ranks, too."""

    def __init__(self, ranks: int, seconds: float, smaller: bool = False) -> None:
        self.ranks, self.seconds = ranks, seconds
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["soak.faults", "torch.distributed"])
        pipes = [context.Pipe() for _ in range(ranks)]
        self.connections = [mine for mine, _ in pipes]
        self.processes = [
            context.Process(
                target=_serve, args=(rank, ranks, store, seconds, smaller, pipe[1]), daemon=True
            )
            for rank, pipe in enumerate(pipes)
        ]
        # The server, which the first process starts, finds its modules by this variable alone.
        with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
            for process in self.processes:
                process.start()
        for _, theirs in pipes:
            theirs.close()

    def run(self, function: Callable[..., Any], *arguments: Any, ranks: int = 0) -> list[Outcome]:
        """The outcomes of `function(rank, group, *arguments)` on the first ranks; 0: on all.

        A rank that has not answered after twice the timeout and a minute hangs.
        """
        asked = self.connections[: ranks or self.ranks]
        for connection in asked:
            connection.send((len(asked), function, arguments))
        ends = time.monotonic() + 2 * self.seconds + 60
        return [self._receive(connection, ends) for connection in asked]

    def run_but(
        self, faulty: int, seconds: float, function: Callable[..., Any], *arguments: Any
    ) -> list[Outcome]:
        """The same on all ranks, in a group with a timeout of its own, without waiting for a rank
        that will not answer."""
        # All make the group before the rank fails.
        self._send(seconds, _nothing)
        made = [self._receive(each, time.monotonic() + 60) for each in self.connections]
        if any(outcome.error for outcome in made):
            return [o._replace(error=f"no group: {o.error}") for o in made]
        self._send(seconds, function, *arguments)
        ends = time.monotonic() + 2 * seconds + 60
        return [
            Outcome(None, "", 0.0) if rank == faulty else self._receive(connection, ends)
            for rank, connection in enumerate(self.connections)
        ]

    def _send(self, group: float, function: Callable[..., Any], *arguments: Any) -> None:
        for connection in self.connections:
            connection.send((group, function, arguments))

    def _receive(self, connection: Connection, ends: float) -> Outcome:
        try:
            if not connection.poll(max(0.0, ends - time.monotonic())):
                return Outcome(None, "hangs", self.seconds)
            return connection.recv()
        except (EOFError, ConnectionResetError):
            return Outcome(None, "died", 0.0)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        for connection in self.connections:
            connection.close()
        self._folder.cleanup()


def _serve(
    rank: int, ranks: int, store: str, seconds: float, smaller: bool, connection: Connection
) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    return_freed_memory()
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=seconds)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timeout
    )

    groups: dict[float, dist.ProcessGroup | None] = {ranks: None}
    for size in range(1, ranks) if smaller else ():
        groups[size] = dist.new_group(list(range(size)), timeout=timeout)
    while True:
        try:
            size, function, arguments = connection.recv()
        except EOFError:
            return
        if size not in groups:  # of all ranks, by its timeout
            groups[size] = dist.new_group(timeout=datetime.timedelta(seconds=size))
        # In a thread of its own: torch keeps compiled products for each shape and thread.
        with ThreadPoolExecutor(1) as pool:
            connection.send(pool.submit(_outcome, function, rank, groups[size], arguments).result())


def _nothing(rank: int, group: dist.ProcessGroup | None) -> None:
    pass


def _outcome(
    function: Callable[..., Any], rank: int, group: dist.ProcessGroup | None, arguments: tuple
) -> Outcome:
    begun = time.monotonic()
    try:
        result, error = function(rank, group, *arguments), ""
    except Exception as raised:
        result, error = None, f"{type(raised).__name__}: {raised}"
    return Outcome(result, error, time.monotonic() - begun)
