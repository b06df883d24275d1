"""A pool of processes that run functions together, as ranks of a gloo group.

A function is `f(rank, world_size, *arguments)` of a module that the ranks can import. Its result,
or the error that it raises, comes back from every rank.
"""

import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 120.0


class Failed(Exception):
    """A rank's error, as text."""


class Ranks:
    """`world_size` processes in one group."""

    def __init__(self, world_size: int, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self.broken = False  # a rank died or gave no answer
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        context = mp.get_context("spawn")
        pipes = [context.Pipe() for _ in range(world_size)]
        self.connections = [mine for mine, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(rank, world_size, store, pipe[1]), daemon=True)
            for rank, pipe in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Each rank's result. Raises Failed if a rank raised or died."""
        results = self.outcomes(function, *arguments)
        for rank, result in enumerate(results):
            if isinstance(result, Failed):
                raise Failed(f"rank {rank}: {result}")
        return results

    def outcomes(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Each rank's result, or a Failed if it raised or died."""
        for connection in self.connections:
            connection.send((function, arguments))
        return [self._receive(connection) for connection in self.connections]

    def _receive(self, connection: Connection) -> Any:
        try:
            if not connection.poll(self.seconds):
                self.broken = True
                return Failed(f"no answer within {self.seconds} s")
            return connection.recv()
        except (EOFError, ConnectionResetError):
            self.broken = True
            return Failed("died")

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _serve(rank: int, world_size: int, store: str, connection: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    while True:
        function, arguments = connection.recv()
        try:
            torch.manual_seed(0)
            result = function(rank, world_size, *arguments)
        except Exception as error:
            last = traceback.format_exc().strip()
            result = Failed(f"{type(error).__name__}: {error}\n{last}")
        connection.send(result)
