"""Models for sentence-transformers' losses whose features are already embedded."""

from __future__ import annotations

import torch
from support.bench import importing  # noqa: F401 -- makes `bench` importable
from torch import Tensor, nn

from bench.hosts.embedded import Embedded


def guide() -> Embedded:
    """The guide of a GIST loss: returns the feature `guide`."""
    return Embedded("guide")


class Projected(Embedded):
    """A model that trains one matrix on its features."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.linear = nn.Linear(width, features, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.linear.weight.normal_(generator=generator)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": self.linear(features[self.column])}

    def get_embedding_dimension(self) -> int:
        return self.linear.out_features
