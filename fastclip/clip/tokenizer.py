"""A byte-level BPE tokenizer: captions to token ids and back.

A thin wrapper of the `tokenizers` package that adds CLIP's `<start> ... <end>` and padding. Any
text can be encoded, since every byte is a token. Text is lower-cased, as in CLIP.

Neural Machine Translation of Rare Words with Subword Units, arXiv 1508.07909.
"""

from collections.abc import Iterable, Sequence
from os import PathLike, fspath

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

# The special tokens get the last ids, in this order. <end> has the highest one, by which the text
# tower finds the end of a caption.
SPECIAL = ("<pad>", "<start>", "<end>")


class Tokenizer:
    """Converts captions to token ids. `Tokenizer.train` learns one, `Tokenizer(path)` reads it."""

    def __init__(self, path: str | PathLike[str]) -> None:
        """Reads the JSON file that `save` wrote. Raises OSError if it cannot be read."""
        with open(path, encoding="utf-8") as file:
            self._set(tokenizers.Tokenizer.from_str(file.read()))

    def _set(self, bpe: tokenizers.Tokenizer) -> None:
        self._bpe = bpe
        # A caption's "<end>" is text; else it would cut the caption short in the text tower.
        bpe.encode_special_tokens = True
        self.pad, self.start, self.end = (bpe.token_to_id(token) for token in SPECIAL)
        self.vocab_size: int = bpe.get_vocab_size()

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learns merges from captions until there are `vocab_size` tokens or nothing to merge.

        Raises:
            ValueError: the vocabulary cannot hold the 256 bytes and the three special tokens.
        """
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if vocab_size < len(alphabet) + len(SPECIAL):
            raise ValueError(
                f"vocab_size must be at least {len(alphabet) + len(SPECIAL)}, got {vocab_size}"
            )
        bpe = tokenizers.Tokenizer(models.BPE())
        bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        # A space is added before the first word, so that a word is the same token everywhere.
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
        """Returns captions as rows of ids, `<start> ... <end> <pad>...`.

        Args:
            context_length: the most tokens of a row. A longer caption is cut before its `<end>`.

        Returns:
            (len(captions), T) int64; T is the length of the longest row, at most `context_length`.
        """
        # The rows below add the special tokens.
        room = context_length - 2
        rows = [
            [self.start, *encoding.ids[:room], self.end]
            for encoding in self._bpe.encode_batch(list(captions), add_special_tokens=False)
        ]
        longest = max(map(len, rows), default=0)
        return torch.tensor([row + [self.pad] * (longest - len(row)) for row in rows]).long()

    def decode(self, tokens: Tensor) -> list[str]:
        """Returns the captions of rows of ids, in lower case, without the special tokens."""
        return [text.removeprefix(" ") for text in self._bpe.decode_batch(tokens.tolist())]
