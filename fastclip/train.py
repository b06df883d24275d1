"""Trains a small CLIP, on emoji or on your own pairs: `python -m fastclip.train --help`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from .packages import install_line


def main(argv: Sequence[str] | None = None) -> None:
    try:
        from .demo import command_line, train
        from .demo.losses import IMPLEMENTATIONS, LOSSES
        from .demo.workers import Workers
        from .pairs import command_line as pairs_command_line
        from .pairs import train as train_on_pairs
    except ModuleNotFoundError as error:
        line = install_line(error, "demo")
        if line is None:
            raise
        sys.exit(f"python -m fastclip.train: {line}")
    options = command_line.parser(LOSSES, IMPLEMENTATIONS)
    of_pairs = pairs_command_line.add_options(options)
    options.quiet = Workers.launched().local_rank > 0
    args = options.parse_args(argv)
    if args.pairs is not None:
        if args.matching != "none" or args.loss == "devise":
            options.error("--matching and --loss devise must be left out with --pairs")
        options.set_defaults(out=Path("trained"))
        train_on_pairs.main(options.parse_args(argv), options)
        return
    for action in of_pairs:
        if getattr(args, action.dest) != action.default:
            options.error(f"argument {action.option_strings[0]}: needs --pairs")
    train.main(argv)


if __name__ == "__main__":
    main()
