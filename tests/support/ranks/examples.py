"""The examples of docs/examples on ranks."""

import importlib.util
from types import ModuleType

from support.installation import ROOT
from support.peers import peer
from support.ranks.trainers import environment


def example(name: str) -> ModuleType:
    path = ROOT / "docs/examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def losses(rank: int, world_size: int, name: str, host: str = "torch") -> list[float]:
    peer(host)
    environment(rank, world_size)
    return example(name).train()
