"""Ctrl-C at a step's end: what is kept then is the state after a whole step, on every rank."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interruptible(patient: bool = False) -> Iterator[Callable[[], bool]]:
    """Gives a function that tells whether Ctrl-C was pressed within; ends in KeyboardInterrupt if
    so. A second Ctrl-C interrupts at once, unless `patient`: torchrun may send one twice, and kills
    after 30 s what does not end.
    """
    asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked and not patient:
            raise KeyboardInterrupt
        asked = True

    before = signal.getsignal(signal.SIGINT)
    # A shell's background jobs ignore it, and so it stays; other threads cannot set a handler.
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
