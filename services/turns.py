"""One thread of this process at a time for whatever has the same name, in the order of asking.

The database decides between processes; within one, threads that want the same row would only make
each other wait for its lock, and a hundred of them longer than the database's patience.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator

from errors import DeadlineExceededError, OverloadedError


def willing() -> None:
    """What most have to do before they wait."""


class Turns:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.lines: dict[str, deque[threading.Event]] = {}  # whose turn it is comes first

    @contextlib.contextmanager
    def of(
        self, name: str | None, timeout: float, before_waiting: Callable[[], None] = willing
    ) -> Iterator[None]:
        """Wait for one's turn; None waits for nothing. Raises DeadlineExceededError.

        ``before_waiting`` is called where it is not one's turn yet, and may refuse by raising.
        """
        if name is None:
            yield
            return
        turn = self.join(name)
        try:
            if not turn.is_set():
                before_waiting()
                if not turn.wait(timeout):
                    raise DeadlineExceededError
            yield
        finally:
            self.leave(name, turn)

    def join(self, name: str) -> threading.Event:
        turn = threading.Event()
        with self.lock:
            line = self.lines.setdefault(name, deque())
            line.append(turn)
            line[0].set()
        return turn

    def leave(self, name: str, turn: threading.Event) -> None:
        with self.lock:
            line = self.lines[name]
            line.remove(turn)
            if line:
                line[0].set()
            else:
                del self.lines[name]


class Places:
    """At most ``most`` threads may wait at once: each is one that serves no other request."""

    def __init__(self, most: int) -> None:
        self.free = threading.Semaphore(most)

    @contextlib.contextmanager
    def one(self) -> Iterator[Callable[[], None]]:
        """What to call before any wait of the block. It raises OverloadedError.

        The place that it takes is kept until the block ends, so who has waited is not refused.
        """
        taken = False

        def take() -> None:
            nonlocal taken
            if not taken and not self.free.acquire(blocking=False):
                raise OverloadedError
            taken = True

        try:
            yield take
        finally:
            if taken:
                self.free.release()
