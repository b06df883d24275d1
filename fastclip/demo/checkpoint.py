"""The state of a training after a step, in a file from which it resumes bit for bit.

The parts of a training have `state_dict` and `load_state_dict`, as in torch. The file is written by
`torch.save` and read by `torch.load(weights_only=True)`, so it holds no code.
"""

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch


class Part(Protocol):
    """A part of a training: the model, the optimizer, the stream of batches, the run."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


@dataclass(frozen=True)
class Checkpoint:
    """A training's checkpoint file and its conditions.

    settings: what determines the curve; only a training with the same settings can resume.
    place: what determines its rounding, such as the number of ranks; it may change.
    every: steps between writes; 0: never.
    """

    path: Path
    settings: Mapping[str, Any]
    place: Mapping[str, Any]
    every: int = 0

    def save(self, parts: Mapping[str, Part]) -> None:
        """Writes the file atomically."""
        state = {"settings": dict(self.settings), "place": dict(self.place)}
        part_of_it = self.path.with_name(self.path.name + ".part")
        torch.save(
            {**state, **{name: part.state_dict() for name, part in parts.items()}}, part_of_it
        )
        os.replace(part_of_it, self.path)

    def load(self) -> dict[str, Any]:
        """Reads the file, for `restore`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: another file, or other settings.
        """
        if not self.path.is_file():
            raise FileNotFoundError(
                f"{self.path} must exist to resume from, got no such file; a training that ends "
                "removes its own"
            )
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            settings, _ = state["settings"], state["place"]
        except (RuntimeError, EOFError, LookupError, TypeError, pickle.UnpicklingError) as error:
            what = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{self.path} must be a training's state, got: {what}") from None
        names = [n for n in (*self.settings, *settings) if self.settings.get(n) != settings.get(n)]
        if names:
            wanted, got = (
                ", ".join(f"{n} {values.get(n)}" for n in dict.fromkeys(names))
                for values in (settings, self.settings)
            )
            raise ValueError(f"settings must be those of {self.path}: {wanted}, got {got}")
        return state

    def moved(self, state: Mapping[str, Any]) -> str:
        """The differences of place from `state`, in words; empty if there are none."""
        return ", ".join(
            f"{state['place'].get(name)} {name} before, {value} now"
            for name, value in self.place.items()
            if state["place"].get(name) != value
        )

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def restore(state: Mapping[str, Any], parts: Mapping[str, Part]) -> None:
    for name, part in parts.items():
        part.load_state_dict(state[name])
