"""Ctrl-C and SIGTERM, once or twice."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

TERMINATED = 128 + signal.SIGTERM
"""The exit code of a command that SIGTERM has ended, as shells count: 143."""


class _AtOnce(BaseException):
    """Raised by a second SIGTERM. No `Exception`: nothing on the way may take it for its own."""


class Signals:
    """What a process has been asked for while it was busy.

    Args:
        stop: called with the signal's number and False when it comes, from within its handler,
            and with True once a second one has broken off what was going on.

    Source: ours.
    """

    def __init__(self, stop: Callable[[int, bool], None]) -> None:
        self.stop = stop
        self.terminated = False
        self._before: Any = signal.SIG_DFL

    def leave(self) -> None:
        """End the process as SIGTERM would have, or let a handler of the user's decide.

        Raises:
            SystemExit: with `TERMINATED`, where nobody else had a handler for SIGTERM.
        """
        if callable(self._before):
            self._before(signal.SIGTERM, None)
        else:
            raise SystemExit(TERMINATED)

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Let the first Ctrl-C or SIGTERM be a wish, and only the second break off the block.

        Outside the main thread, where Python sets no signal handlers, nothing is changed.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        interrupt = signal.signal(signal.SIGINT, self._interrupt)
        self._before = signal.getsignal(signal.SIGTERM)
        # Ignored, it was meant to be; None is a handler that is not Python's.
        heeds = self._before is not signal.SIG_IGN and self._before is not None
        if heeds:
            signal.signal(signal.SIGTERM, self._terminate)
        try:
            yield
        except KeyboardInterrupt:
            self.stop(signal.SIGINT, True)
        except _AtOnce:
            self.stop(signal.SIGTERM, True)
        finally:
            signal.signal(signal.SIGINT, interrupt)
            if heeds:
                signal.signal(signal.SIGTERM, self._before)

    def _interrupt(self, number: int, frame: Any) -> None:
        # Not the handler before: a shell starts its background jobs with interrupts ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.stop(number, False)

    def _terminate(self, number: int, frame: Any) -> None:
        if self.terminated:
            raise _AtOnce
        self.terminated = True
        self.stop(number, False)
