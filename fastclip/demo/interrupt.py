"""Ctrl-C takes effect at the end of a step, so that the saved state is that of a whole step."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interruptible(patient: bool = False) -> Iterator[Callable[[], bool]]:
    """A context whose function tells if Ctrl-C was pressed; its end raises KeyboardInterrupt then.

    A second Ctrl-C interrupts at once, unless `patient`: torchrun may send two, and kills after
    30 s a process that does not end.
    """
    asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked and not patient:
            raise KeyboardInterrupt
        asked = True

    before = signal.getsignal(signal.SIGINT)
    # A shell's background jobs ignore SIGINT, which is left so. Other threads cannot set handlers.
    if before is not signal.default_int_handler or (
        threading.current_thread() is not threading.main_thread()
    ):
        yield lambda: False
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:  # after the last step
        raise KeyboardInterrupt
