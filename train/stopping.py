"""Ctrl-C and SIGTERM, as sent by job schedulers and torchrun: a training stops where none of its
work is lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

AT_ONCE = 1.0
"""Seconds within which signals count as one: a terminal's reaches a process, and what started it
passes it on."""

SOON = b"\nmocapsnet: stopping after this step or test; once more stops at once, and loses it\n"


class Stopper:
    """Turns signals into KeyboardInterrupt, at once or when a step is whole.

    Attributes:
        asked: whether one has come; in a `held` block it waits for the end.
    """

    def __init__(self) -> None:
        self.asked = False
        self._held = False
        self._told = False  # by a signal of its own
        self._last = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Signals inside come here, if this is the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {signal.SIGTERM: signal.signal(signal.SIGTERM, self._signalled)}
        # A shell without job control lets what it starts in the background ignore Ctrl-C.
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            before[signal.SIGINT] = signal.signal(signal.SIGINT, self._signalled)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def held(self, together: Callable[[bool], bool] = bool) -> Iterator[None]:
        """A first signal inside waits until the block has ended. Raises: KeyboardInterrupt then.

        Args:
            together: given whether this process is asked to stop, returns whether all of them do,
                so that none waits for one that has.
        """
        self._held = True
        try:
            yield
            stop = together(self.asked)
        finally:
            self._held = False
        if stop:
            self.asked = True
            raise KeyboardInterrupt

    def _signalled(self, *_: object) -> None:
        before, self._last = self._last, time.monotonic()
        if self._told and self._last - before < AT_ONCE:
            return
        waits = self._held and not self._told
        self.asked = self._told = True
        if not waits:
            raise KeyboardInterrupt
        if os.environ.get("RANK", "0") == "0":
            os.write(2, SOON)  # print may be at work, and is not to be called twice
