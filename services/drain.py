"""The end of a process: no new work, running work finishes in its time, the rest is interrupted.

Servers wait for open connections before they shut an application down, some without end: for a
request body that never comes, say. So the deadline is kept here, from the signal on.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from log import event
from services.live import LiveGenerations
from services.model_host import ModelHost

log = logging.getLogger(__name__)

STORING_SECONDS = 1.5  # for the rows of what had to be interrupted


class Drain:
    """``grace`` seconds after SIGTERM or SIGINT, ``close`` is called and the server told to go."""

    def __init__(
        self, models: ModelHost, live: LiveGenerations, grace: float, close: Callable[[], None]
    ) -> None:
        self.models = models
        self.live = live
        self.grace = grace
        self.close = close
        self.previous: dict[int, Any] = {}
        self.deadline: float | None = None
        self.lock = threading.Lock()
        self.finished = threading.Event()

    def install(self) -> None:
        """Hear the signals before the server does. Only a main thread may."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            self.previous[number] = signal.getsignal(number)
            signal.signal(number, self.on_signal)

    def uninstall(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous.clear()

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.deadline is None:
            self.deadline = time.monotonic() + self.grace
            self.models.refuse("it is stopping")
            self.live.let_finish()  # before the server hangs up on followers
            threading.Thread(target=self.keep_deadline, name="drain", daemon=True).start()
        previous = self.previous.get(number)
        if callable(previous):
            asked = number == signal.SIGINT or not self.models.gave_up
            previous(number if asked else failure_signal(), frame)

    def keep_deadline(self) -> None:
        """Where the server has not come to its end by the deadline, end it."""
        if self.finished.wait(self.grace):
            return
        self.finish()
        self.close()
        os.kill(os.getpid(), signal.SIGINT)  # the second signal: leave the connections

    def finish(self) -> None:
        """Wait for running work until the deadline, interrupt the rest, let its rows be stored."""
        with self.lock:
            if self.finished.is_set():
                return
            if self.deadline is not None:
                self.live.wait_until_none(max(0.0, self.deadline - time.monotonic()))
            running = len(self.live.all())
            self.models.close()
            stored = self.live.wait_until_none(STORING_SECONDS)
            self.finished.set()
        event(log, logging.INFO, "drained", interrupted=running, all_stored=stored)


def failure_signal() -> int:
    """What to tell a server that ends because of the model, for the exit status to say so.

    When all is done it raises the signal again that it heard of. From SIGTERM the process would
    die as if that had been asked for; this one ends it with status 1.
    """
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(1))
    return signal.SIGUSR1
