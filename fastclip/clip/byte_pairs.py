"""CLIP's byte-pair encoding, from OpenAI's file of merges or from vocab.json and merges.txt.

A word ends with "</w>". The vocabulary holds 256 bytes, 256 bytes that end a word, the merges in
their order, and the start and the end of a text.
"""

import gzip
import json
from pathlib import Path

import tokenizers
from tokenizers import Regex, models, pre_tokenizers

# The file of OpenAI has more merges than the vocabulary of 49,408 takes.
MERGES = 49152 - 256 - 2
END_OF_WORD = "</w>"
SPECIAL = ("<|startoftext|>", "<|endoftext|>")
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def words() -> pre_tokenizers.PreTokenizer:
    """Returns CLIP's rule that splits a text: letters, single digits, other signs."""
    split = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, as_bytes])


def read_merges(path: Path) -> list[tuple[str, str]]:
    """Returns the pairs of a file whose first line is a title.

    Raises:
        ValueError: a line is no pair.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : MERGES + 1]
    pairs = [tuple(line.split()) for line in lines if line]
    if wrong := [pair for pair in pairs if len(pair) != 2]:
        raise ValueError(f"{path} must hold a title and pairs of tokens, got {' '.join(wrong[0])}")
    return pairs  # type: ignore[return-value]


def read(merges: Path, vocabulary: Path | None = None) -> tokenizers.Tokenizer:
    """Returns the tokenizer of a file of merges, and of vocab.json where ids come from it."""
    pairs = read_merges(merges)
    if vocabulary is None:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # OpenAI's order
        tokens = [*letters, *(f"{letter}{END_OF_WORD}" for letter in letters)]
        tokens += ["".join(pair) for pair in pairs]
        ids = {token: k for k, token in enumerate([*tokens, *SPECIAL])}
    else:
        ids = json.loads(vocabulary.read_text(encoding="utf-8"))
    return tokenizers.Tokenizer(models.BPE(ids, pairs, end_of_word_suffix=END_OF_WORD))
