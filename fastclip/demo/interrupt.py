"""Delays Ctrl-C to the end of a step, so that every rank stops after the same whole step."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interruptible(patient: bool = False) -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether Ctrl-C was pressed in the context.

    If it was, the end of the context raises KeyboardInterrupt. A second Ctrl-C interrupts at once,
    unless `patient`: torchrun may send one twice, and it kills a process that does not end in 30 s.
    """
    pressed = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed and not patient:
            raise KeyboardInterrupt
        pressed = True

    before = signal.getsignal(signal.SIGINT)
    # Nothing is delayed where the handler is not Python's own (a shell's background jobs ignore
    # Ctrl-C, and must go on ignoring it), nor outside the main thread, which alone may set one.
    if before is not signal.default_int_handler or (
        threading.current_thread() is not threading.main_thread()
    ):
        yield lambda: False
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:  # after the last step
        raise KeyboardInterrupt
