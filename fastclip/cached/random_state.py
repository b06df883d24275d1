"""The states of the random number generators that a model's forward may draw from."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


class RandomState:
    """The states of the global generators: torch's, of the CPU and of some devices, Python's, and
    numpy's, from which libraries such as transformers draw masks."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._devices = {
            device: torch.get_device_module(device).get_rng_state(device) for device in devices
        }
        self._python = random.getstate()
        numpy = sys.modules.get("numpy")
        self._numpy = None if numpy is None else numpy.random.get_state()

    def set(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._devices.items():
            torch.get_device_module(device).set_rng_state(state, device)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)


@contextmanager
def restored(devices: Iterable[torch.device]) -> Iterator[None]:
    """Restores, on exit, the states that the generators have on entry."""
    before = RandomState(devices)
    try:
        yield
    finally:
        before.set()
