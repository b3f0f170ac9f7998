"""One thread of this process at a time for whatever has the same name, in the order of asking.

The database decides between processes; within one, threads that want the same row would only make
each other wait for its lock, and a hundred of them longer than the database's patience.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Iterator

from errors import DeadlineExceededError
from services.patience import Patience


class Turns:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.lines: dict[str, deque[threading.Event]] = {}  # whose turn it is comes first

    @contextlib.contextmanager
    def of(self, name: str | None, patience: Patience) -> Iterator[None]:
        """Wait for one's turn; None waits for nothing.

        Raises DeadlineExceededError, and OverloadedError where too many wait.
        """
        if name is None:
            yield
            return
        turn = self.join(name)
        try:
            if not turn.is_set() and not turn.wait(patience.to_wait()):
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
