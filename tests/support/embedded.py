"""Models for sentence-transformers' losses whose features are already embedded."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Embedded(nn.Module):
    """A model that returns one of its features, with the tokenizer that GIST losses ask for.

    Features are tensors by column name: `embedding` of this model, `guide` of `Guide`.
    """

    column = "embedding"
    max_seq_length = 1

    def __init__(self) -> None:
        super().__init__()
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from transformers import PreTrainedTokenizerFast

        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0})))

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features[self.column]}

    def __getitem__(self, index: int) -> Embedded:
        return self


class Guide(Embedded):
    column = "guide"


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
