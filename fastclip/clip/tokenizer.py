"""Byte-level BPE: encodes captions to token ids for the text tower, and decodes them.

A thin cover over the `tokenizers` package that adds CLIP's framing, `<start> ... <end>`, and
padding. Any text can be encoded, since every byte is a token; case is dropped, as in CLIP. Nothing
here knows what the captions are about.

Neural Machine Translation of Rare Words with Subword Units, arXiv 1508.07909.
"""

from collections.abc import Iterable, Sequence
from os import PathLike, fspath

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

# In the order of their ids, after all other tokens: the text tower finds a caption's end by the
# highest id in its row.
SPECIAL = ("<pad>", "<start>", "<end>")


class Tokenizer:
    """Encodes captions. `Tokenizer.train` learns a tokenizer, `Tokenizer(path)` reads one."""

    def __init__(self, path: str | PathLike[str]) -> None:
        """Reads a JSON file of `save`. Raises OSError without one."""
        with open(path, encoding="utf-8") as file:
            self._set(tokenizers.Tokenizer.from_str(file.read()))

    def _set(self, bpe: tokenizers.Tokenizer) -> None:
        self._bpe = bpe
        self.pad, self.start, self.end = (bpe.token_to_id(token) for token in SPECIAL)
        self.vocab_size: int = bpe.get_vocab_size()

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learns merges from captions until there are `vocab_size` tokens or nothing to merge.

        Raises:
            ValueError: a vocabulary too small for the 256 bytes and the three special tokens.
        """
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if vocab_size < len(alphabet) + len(SPECIAL):
            raise ValueError(
                f"vocab_size must be at least {len(alphabet) + len(SPECIAL)}, got {vocab_size}"
            )
        bpe = tokenizers.Tokenizer(models.BPE())
        bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        # A space before the first word makes a word the same token at any place.
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        bpe.decoder = decoders.ByteLevel()
        bpe.train_from_iterator(
            captions,
            trainers.BpeTrainer(
                vocab_size=vocab_size - len(SPECIAL),
                initial_alphabet=alphabet,
                show_progress=False,
            ),
        )
        bpe.add_special_tokens(list(SPECIAL))
        tokenizer = cls.__new__(cls)
        tokenizer._set(bpe)
        return tokenizer

    def save(self, path: str | PathLike[str]) -> None:
        """Writes one JSON file."""
        self._bpe.save(fspath(path))

    def encode(self, captions: Sequence[str], context_length: int) -> Tensor:
        """Returns captions as rows `<start> ... <end> <pad>...` of ids, as long as the longest.

        Args:
            context_length: what is longer is cut, and still ends in `<end>`.

        Returns:
            (len(captions), T) int64 with T <= context_length.
        """
        # A caption that spells "<end>" must not become the token.
        room = context_length - 2
        rows = [
            [self.start, *encoding.ids[:room], self.end]
            for encoding in self._bpe.encode_batch(list(captions), add_special_tokens=False)
        ]
        longest = max(map(len, rows), default=0)
        return torch.tensor([row + [self.pad] * (longest - len(row)) for row in rows]).long()

    def decode(self, tokens: Tensor) -> list[str]:
        """Returns the captions of rows of ids, in lower case, without special tokens."""
        return [text.removeprefix(" ") for text in self._bpe.decode_batch(tokens.tolist())]
