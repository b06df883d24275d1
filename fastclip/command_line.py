"""The parts that command lines share: one-line errors, the types of options, the device."""

import argparse
from typing import IO, NoReturn

import torch


class OneLineParser(argparse.ArgumentParser):
    """Reports a wrong option in one line without the usage; prints nothing if `quiet`."""

    quiet = False

    def _print_message(self, message: str, file: IO[str] | None = None) -> None:
        if not self.quiet:
            super()._print_message(message, file)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


positive.__name__ = "whole number"  # argparse names it in its message if the text is no number


def checked_device(text: str) -> torch.device:
    """Returns the device after a trial allocation. Raises ValueError if that fails."""
    try:
        device = torch.device(text)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"cannot use device {text!r}: {str(error).splitlines()[0]}") from None
    return device
