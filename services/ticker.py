"""Repeats an action in a thread of its own until it is stopped."""

import logging
import threading
from collections.abc import Callable

from errors import StorageUnavailableError

log = logging.getLogger(__name__)


class Ticker:
    """``act`` is called every ``seconds``. What it raises is logged; the next turn comes anyway."""

    def __init__(self, name: str, seconds: float, act: Callable[[], None]) -> None:
        self.seconds = seconds
        self.act = act
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.run, name=name, daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """Returns when the turn that runs has ended."""
        self.stopping.set()
        if self.thread.is_alive():
            self.thread.join()

    def run(self) -> None:
        while not self.stopping.wait(self.seconds):
            try:
                self.act()
            except StorageUnavailableError:
                pass  # logged where it was raised
            except Exception:
                log.exception("%s failed", self.thread.name)
