"""The options of a training on one's own pairs, beside those of the demo."""

import argparse
from dataclasses import fields
from pathlib import Path

from ..clip.model import CLIPConfig
from ..command_line import positive
from ..demo.command_line import not_negative

# The sizes of the model that are options; the vocabulary's is the tokenizer's.
SIZES = [f.name for f in fields(CLIPConfig) if f.type is int and f.name != "vocab_size"]
DEFAULT_SIZES = {"image_size": 64, "context_length": 32}  # photographs show more than emoji
HELP = {
    "embed_dim": "width of the features ",
    "image_size": "side of the images, in pixels ",
    "patch_size": "side of a patch, in pixels ",
    "context_length": "tokens of a caption at most ",
}


def held_out_share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, got {text}")
    return value


def crop_share(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0.1 to 1, got {text}")
    return value


def decay(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return value


def tokens(text: str) -> int:
    value = int(text)
    if value < 3:  # <start>, a token and <end>
        raise argparse.ArgumentTypeError(f"must be at least 3, got {value}")
    return value


# argparse names these in its message if the text is not a number.
tokens.__name__ = "whole number"
held_out_share.__name__ = crop_share.__name__ = decay.__name__ = "number"


def add_options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Adds the options to the demo's parser and returns them."""
    parser.description += (
        " With --pairs, train it on your own image-text pairs instead, and report retrieval on a "
        "held-out share of them."
    )
    parser.epilog += (
        ". With --pairs, tokenizer.json and pairs.png are written in place of the demo's pictures, "
        "and there is no second run to compare with: --no-compare changes nothing. "
        "docs/own-pairs.md shows how to lay out data"
    )
    group = parser.add_argument_group(
        "own pairs", "Train on your own image-text pairs. The other options below need --pairs."
    )
    add = group.add_argument
    actions = [
        add(
            "--pairs",
            metavar="SOURCE",
            help="a .csv, .tsv or .jsonl file with an image's path and a caption in each row; a "
            "folder of images with a .txt beside each, one caption a line; WebDataset tars: a "
            "folder of them, one, or a path such as 'shards/{000..009}.tar'",
        ),
        add(
            "--image-column",
            metavar="NAME",
            help="column of image paths, which are relative to the table (default: the first of "
            "filepath, path, image, file_name, filename, file)",
        ),
        add(
            "--caption-column",
            metavar="NAME",
            help="column of captions (default: the first of title, caption, text)",
        ),
        add(
            "--held-out",
            type=held_out_share,
            default=0.1,
            metavar="SHARE",
            help="share of the images that are evaluated with and not trained on; a hash of the "
            "name chooses them (default %(default)s)",
        ),
        add(
            "--evaluate-every",
            type=not_negative,
            default=100,
            metavar="STEPS",
            help="evaluate up to 1,000 held-out images after every STEPS steps, and all of them at "
            "the end; 0: at the end alone (default %(default)s)",
        ),
        add(
            "--workers",
            type=not_negative,
            default=2,
            help="processes that decode images, for each training process; the curve is the same "
            "for any number (default %(default)s)",
        ),
        add(
            "--crop",
            type=crop_share,
            default=0.8,
            metavar="SHARE",
            help="least area of a random training crop, as a share of the largest square; 1: the "
            "whole square (default %(default)s)",
        ),
        add(
            "--flip",
            action="store_true",
            help="mirror half of the training images, at random; not for captions that say left "
            "or right",
        ),
        add(
            "--weight-decay",
            type=decay,
            default=0.2,
            help="weight decay of the matrices (default %(default)s; the demo's is 1)",
        ),
        add(
            "--tokenizer",
            type=Path,
            metavar="FILE",
            help="a tokenizer.json of an earlier training (default: learn one from the captions "
            "to train on)",
        ),
        add(
            "--vocab-size",
            type=positive,
            default=8192,
            help="most tokens of a tokenizer that is learnt (default %(default)s)",
        ),
    ]
    sizes = parser.add_argument_group("the model for own pairs", "The demo's model is fixed.")
    for name in SIZES:
        default = DEFAULT_SIZES.get(name, getattr(CLIPConfig, name))
        actions.append(
            sizes.add_argument(
                f"--{name.replace('_', '-')}",
                type=tokens if name == "context_length" else positive,
                default=default,
                metavar="SIZE",
                help=f"{HELP.get(name, '')}(default %(default)s)",
            )
        )
    return actions
