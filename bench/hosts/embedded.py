"""A model for sentence-transformers' losses whose features are already embedded."""

from __future__ import annotations

from torch import Tensor, nn


class Embedded(nn.Module):
    """Returns one of its features, and has the tokenizer that GIST losses ask for."""

    max_seq_length = 1

    def __init__(self, column: str = "embedding") -> None:
        super().__init__()
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from transformers import PreTrainedTokenizerFast

        self.column = column
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0})))

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features[self.column]}

    def __getitem__(self, index: int) -> Embedded:
        return self
