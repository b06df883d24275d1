"""Two-tower models: how a class makes its features from the arguments of its forward."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from torch import Tensor

from .similarity import CLIP, Similarity


def pooled(outputs: Any) -> Tensor:
    return outputs.pooler_output


def second(outputs: Any) -> Tensor:
    return outputs[1]


def first_token(outputs: Any) -> Tensor:
    return outputs[0][:, 0, :]


@dataclass(frozen=True, eq=False)
class Tower:
    """A model's attribute that is called with arguments of the forward.

    inputs: their names. main: those of which one must be given. projection: the attribute that the
    features pass through. rest: True if it takes the forward's further keywords, too.
    """

    attribute: str
    inputs: tuple[str, ...]
    projection: str | None = None
    main: tuple[str, ...] = ()
    rest: bool = True
    constants: Mapping[str, Any] = field(default_factory=dict)
    features: Callable[[Any], Tensor] = pooled

    def given(self, arguments: Mapping[str, Any]) -> bool:
        return any(arguments[name] is not None for name in self.main or self.inputs[:1])

    def encode(
        self, model: Any, arguments: Mapping[str, Any], rest: Mapping[str, Any]
    ) -> tuple[Any, Tensor]:
        """Returns what the tower returns, and its features (N, D)."""
        inputs = {name: arguments[name] for name in self.inputs} | dict(self.constants)
        outputs = getattr(model, self.attribute)(**inputs, **(rest if self.rest else {}))
        features = self.features(outputs)
        if self.projection is not None:
            features = getattr(model, self.projection)(features)
        return outputs, features


@dataclass(frozen=True, eq=False)
class Family:
    """A class of models with a forward of one form.

    file: the module's name in transformers.models; path: its whole name.
    other: the first tower, named `sort` in the outputs; text: the second one.
    norm: the function of the module that returns the lengths of rows; None: `Tensor.norm`.
    same_dtype: the first tower's features take the dtype and device of the texts'.
    from_config: arguments that the config has if they are None.
    ignored: arguments that the class ignores. unless: arguments with which its own code serves.
    """

    name: str
    file: str
    output: str
    other: Tower
    text: Tower
    similarity: Similarity = CLIP
    sort: str = "image"
    norm: str | None = None
    same_dtype: bool = False
    from_config: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        return f"transformers.models.{self.file}.modeling_{self.file}"

    def module(self) -> ModuleType:
        return importlib.import_module(self.path)

    def find(self) -> type | None:
        """Returns the class, or None if this version of transformers does not have it."""
        try:
            return getattr(self.module(), self.name, None)
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith(f"transformers.models.{self.file}"):
                raise
            return None

    def parameters(self) -> set[str]:
        """The arguments of the forward."""
        towers = {*self.other.inputs, *self.text.inputs}
        return {"return_loss", *towers, *self.from_config, *self.ignored, *self.unless}
