"""Ctrl-C, pressed once or twice."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interruptible(stop: Callable[[bool], None]) -> Iterator[None]:
    """Let the first Ctrl-C be a wish, and only the second break off what is going on.

    Outside the main thread, where Python sets no signal handlers, nothing is changed.

    Args:
        stop: called with False at the first Ctrl-C, from within the signal's handler, and with
            True once the second has ended the block.

    Source: ours.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def once(number: int, frame: Any) -> None:
        # Not `before`: a shell starts its background jobs with interrupts ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop(False)

    before = signal.signal(signal.SIGINT, once)
    try:
        yield
    except KeyboardInterrupt:
        stop(True)
    finally:
        signal.signal(signal.SIGINT, before)
