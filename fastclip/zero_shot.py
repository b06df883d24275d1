"""Classifies pictures by words alone: `python -m fastclip.zero_shot --help`.

    python -m fastclip.zero_shot --weights ViT-B-32.pt --images photos --labels "a cat, a dog"

The model may be fastclip's, OpenAI's, open_clip's or transformers'. No parameter is learnt.

Learning Transferable Visual Models From Natural Language Supervision, arXiv 2103.00020,
section 3.1.
"""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .command_line import OneLineParser, checked_device, positive
from .packages import install_line

if TYPE_CHECKING:
    from .clip import CLIP, CLIPConfig, Tokenizer
    from .clip.predictions import Prediction

AT_ONCE = 32  # pictures that the tower holds


def three_numbers(text: str) -> tuple[float, ...]:
    values = tuple(float(part) for part in text.split(","))
    if len(values) != 3:
        raise argparse.ArgumentTypeError(f"must be three numbers, got {text}")
    return values


def template(text: str) -> str:
    try:
        if text.format("x") == text.format("y"):
            raise ValueError
    except Exception:  # a format looks up any attribute or item
        raise argparse.ArgumentTypeError(f"must hold {{}} for the label, got {text!r}") from None
    return text


def option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


three_numbers.__name__ = "list of three numbers"


def parser() -> OneLineParser:
    p = OneLineParser(
        prog="python -m fastclip.zero_shot",
        description="Classify pictures by words alone. Print the most probable labels of each.",
        epilog="The probabilities of a picture add up to 1, except for models with a bias "
        "(SigLIP), where each label has a probability of its own.",
    )
    p.add_argument(
        "--weights", required=True, metavar="F",
        help="file or folder of a model by fastclip, OpenAI, open_clip or transformers",
    )  # fmt: skip
    p.add_argument(
        "--images", required=True, nargs="+", metavar="PATH", help="pictures, or folders of them"
    )
    p.add_argument(
        "--labels", required=True, metavar="LABELS",
        help='labels, "cat, dog", or a file with one a line',
    )  # fmt: skip
    p.add_argument(
        "--tokenizer", metavar="F",
        help="tokenizer.json, OpenAI's bpe_simple_vocab_16e6.txt.gz, or a folder with "
        "tokenizer.json or with vocab.json and merges.txt (default: beside the weights; for CLIP's "
        "vocabulary open_clip's, if it is installed)",
    )  # fmt: skip
    p.add_argument(
        "--template", nargs="+", type=template, default=["a photo of a {}"], metavar="T",
        help="sentences with {} for the label; their features are averaged (default "
        '"a photo of a {}")',
    )  # fmt: skip
    p.add_argument(
        "--top", type=positive, default=5, metavar="K",
        help="labels to print for each picture (default %(default)s)",
    )  # fmt: skip
    p.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default %(default)s)")
    p.add_argument("--csv", type=Path, metavar="F", help="write the table to a CSV file, too")
    p.add_argument("--json", type=Path, metavar="F", help="write the table to a JSON file, too")
    p.add_argument(
        "--config", metavar="F",
        help="open_clip_config.json or config.json of the model (default: beside the weights)",
    )  # fmt: skip
    p.add_argument(
        "--set", nargs="+", type=option, default=[], metavar="NAME=VALUE",
        help="options of the model that the weights do not tell: activation=quick_gelu, "
        "image_heads=12, ...; an error names the missing ones",
    )  # fmt: skip
    p.add_argument(
        "--mean", type=three_numbers, metavar="R,G,B",
        help="normalise pictures with this mean (default: the model's)",
    )  # fmt: skip
    p.add_argument(
        "--std", type=three_numbers, metavar="R,G,B",
        help="normalise pictures with this standard deviation (default: the model's)",
    )  # fmt: skip
    p.add_argument(
        "--resize", choices=("crop", "squash"),
        help="resize the shorter side and cut out the centre, or both sides (default: the model's)",
    )  # fmt: skip
    return p


def read_labels(text: str) -> list[str]:
    """Returns the labels of a file, one a line, or of a list with commas.

    Raises:
        ValueError: there are none, two are equal, or the file is absent or not UTF-8.
        OSError: the file cannot be read.
    """
    path = Path(text)
    there = bool(text.strip()) and is_there(path)
    lines = read_lines(path) if there else text.split(",")
    labels = [line.strip() for line in lines if line.strip()]
    if len(labels) == 1 and not there and looks_like_a_path(labels[0]):
        raise ValueError(f"--labels: no such file: {labels[0]}")
    if not labels:
        raise ValueError(f"--labels must name labels or a file of them, got {text!r}")
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(f"labels must differ, got twice: {', '.join(twice)}")
    return labels


def is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a list of labels may be no file's name, or too long for one
        return False


def looks_like_a_path(label: str) -> bool:
    return label.lower().endswith(".txt") or "/" in label or os.sep in label


def read_lines(path: Path) -> list[str]:
    if path.is_dir():
        raise ValueError(f"--labels must be a file, got a folder: {path}")
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--labels: {path} must be UTF-8: {error}") from None


def find_tokenizer(given: str | None, weights: Path, config: "CLIPConfig") -> "Tokenizer":
    """Returns the tokenizer of the model.

    Raises:
        ValueError: there is none, or it has another vocabulary than the model.
    """
    from .clip import Tokenizer
    from .clip.pretrained.rules import CLIP_VOCABULARY

    folder = weights if weights.is_dir() else weights.parent
    package = importlib.util.find_spec("open_clip")
    path: Path | None = None if given is None else Path(given)
    if path is None and any((folder / name).is_file() for name in ("tokenizer.json", "merges.txt")):
        path = folder
    if path is None and config.vocab_size == CLIP_VOCABULARY and package is not None:
        path = Path(str(package.origin)).parent / "bpe_simple_vocab_16e6.txt.gz"
    if path is None:
        raise ValueError(f"no tokenizer in {folder}: give the model's by --tokenizer")
    if given is None:
        print(f"tokenizer: {path}", file=sys.stderr)
    tokenizer = Tokenizer(path)
    tokenizer.check_fits(config)
    return tokenizer


def predict(
    model: "CLIP", tokenizer: "Tokenizer", images: Sequence[Path], labels: Sequence[str],
    args: argparse.Namespace, device: torch.device,
) -> tuple[list["Prediction"], list[Path]]:  # fmt: skip
    """Returns the predictions, and the files that are no readable pictures."""
    from .clip import class_features, pictures
    from .clip.predictions import best, probabilities

    config = model.config
    fill = tokenizer.fill or not config.causal or config.text_pool == "last"

    def encode(prompts: Sequence[str]) -> torch.Tensor:
        return tokenizer.encode(prompts, config.context_length, fill).to(device)

    changes = {"image_mean": args.mean, "image_std": args.std, "image_resize": args.resize}
    shown = replace(config, **{name: v for name, v in changes.items() if v is not None})
    classes = class_features(model, encode, {label: [label] for label in labels}, args.template)
    predictions: list[Prediction] = []
    unreadable: list[Path] = []
    for start in range(0, len(images), AT_ONCE):
        read: dict[Path, torch.Tensor] = {}
        for path in images[start : start + AT_ONCE]:
            try:
                read[path] = pictures.read(path, shown)
            except Exception as error:  # Pillow's decoders raise almost any
                print(f"not a readable picture: {path} ({error})", file=sys.stderr)
                unreadable.append(path)
        if read:
            p = probabilities(model, torch.stack(list(read.values())).to(device), classes)
            predictions += best(list(read), p, labels, args.top)
    return predictions, unreadable


def check_writable(path: Path | None, option: str) -> None:
    """Raises ValueError if no file can be written there: before the work, which would be lost."""
    if path is None:
        return
    place = path if path.exists() else path.parent
    if path.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(f"{option} must be a file that can be written, got {path}")


def check_options(names: Sequence[str]) -> None:
    """Raises ValueError if --set has a name that is no option of a model."""
    from .clip.pretrained import OPTIONS

    known = ("activation", *OPTIONS)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--set must be among {', '.join(known)}, got {', '.join(unknown)}")


def classify(args: argparse.Namespace) -> int:
    """Prints the table and writes the files. Returns the exit status: 1 without any picture.

    Raises:
        ImportError, OSError, TypeError, ValueError: an option cannot be followed.
    """
    from .clip import load_pretrained, pictures
    from .clip.predictions import table, write_csv, write_json

    check_options([name for name, _ in args.set])
    check_writable(args.csv, "--csv")
    check_writable(args.json, "--json")
    device = checked_device(args.device)
    labels = read_labels(args.labels)
    images = pictures.find(args.images)
    if not images:
        raise ValueError(f"no pictures in {', '.join(args.images)}")
    model = load_pretrained(args.weights, config=args.config, device=device, **dict(args.set))
    model.eval()
    tokenizer = find_tokenizer(args.tokenizer, Path(args.weights), model.config)
    predictions, unreadable = predict(model, tokenizer, images, labels, args, device)
    if predictions:
        print(table(predictions))
    if unreadable:
        print(f"{len(unreadable)} of {len(images)} files are no pictures", file=sys.stderr)
    if args.csv:
        write_csv(args.csv, predictions)
    if args.json:
        write_json(args.json, predictions, unreadable)
    return 0 if predictions else 1


def explained(error: Exception) -> str:
    """Returns the error in the words of the command line."""
    if isinstance(error, ImportError):
        return install_line(error, "pretrained") or str(error)
    from .clip.pretrained import MissingOptions

    if isinstance(error, MissingOptions):
        sets = " ".join(f"{name}=..." for name in error.names)
        return f"{error.problem}; give the model's configuration by --config, or --set {sets}"
    return str(error)


def main(argv: Sequence[str] | None = None) -> None:
    options = parser()
    args = options.parse_args(argv)
    try:
        status = classify(args)
    except (ImportError, OSError, TypeError, ValueError) as error:
        options.error(explained(error))
    except KeyboardInterrupt:
        options.exit(130, f"{options.prog}: interrupted\n")
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
