"""Saves the state of a training after a step, so that it can continue bit for bit.

Each part of a training has `state_dict` and `load_state_dict`, as in torch. Their states are
written by `torch.save`. `torch.load(weights_only=True)` reads the file: it holds no code.
"""

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch


class Stateful(Protocol):
    """A part of a training: the model, the optimiser, the batches, the record of the run."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


@dataclass(frozen=True)
class Checkpoint:
    """The file of a training's state, and the settings that a resumed training must share.

    settings: the options that determine the loss curve. A training resumes with the same ones only.
    place: the conditions that affect rounding alone, such as the number of ranks. They may change.
    every: the number of steps between two writes; 0 never writes.
    """

    path: Path
    settings: Mapping[str, Any]
    place: Mapping[str, Any]
    every: int = 0

    def save(self, parts: Mapping[str, Stateful]) -> None:
        """Writes the file atomically."""
        state = {"settings": dict(self.settings), "place": dict(self.place)}
        unfinished = self.path.with_name(self.path.name + ".part")
        torch.save(
            {**state, **{name: part.state_dict() for name, part in parts.items()}}, unfinished
        )
        os.replace(unfinished, self.path)

    def load(self) -> dict[str, Any]:
        """Returns the state that `save` wrote; `restore` takes it.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: `save` did not write the file, or the settings differ.
        """
        if not self.path.is_file():
            raise FileNotFoundError(
                f"{self.path} must exist to resume from, got no such file; a finished training "
                "removes it"
            )
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            settings, _ = state["settings"], state["place"]
        except (RuntimeError, EOFError, LookupError, TypeError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{self.path} must be a saved training state: {reason}") from None
        names = [n for n in (*self.settings, *settings) if self.settings.get(n) != settings.get(n)]
        if names:
            wanted, got = (
                ", ".join(f"{n} {values.get(n)}" for n in dict.fromkeys(names))
                for values in (settings, self.settings)
            )
            raise ValueError(f"settings must be those of {self.path}: {wanted}, got {got}")
        return state

    def place_changes(self, state: Mapping[str, Any]) -> str:
        """Returns in words how `place` differs from that of `state`; empty if it does not."""
        return ", ".join(
            f"{state['place'].get(name)} {name} before, {value} now"
            for name, value in self.place.items()
            if state["place"].get(name) != value
        )

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def place_of(ranks: int, device: str) -> dict[str, Any]:
    """Returns the `place` of a training in this process."""
    return {"ranks": ranks, "threads": torch.get_num_threads(), "device": device}


def restore(state: Mapping[str, Any], parts: Mapping[str, Stateful]) -> None:
    """Loads a state from `Checkpoint.load` into the parts of a training."""
    for name, part in parts.items():
        part.load_state_dict(state[name])
