"""One thread of this process at a time for whatever has the same name.

The database decides between processes; within one, threads that want the same row would only make
each other wait for its lock, and a hundred of them longer than the database's patience.
"""

import contextlib
import threading
from collections.abc import Iterator

from errors import DeadlineExceededError


class Turns:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.by_name: dict[str, tuple[threading.Lock, int]] = {}  # and how many want it

    @contextlib.contextmanager
    def of(self, name: str | None, timeout: float) -> Iterator[None]:
        """Wait for one's turn; None waits for nothing. Raises DeadlineExceededError."""
        if name is None:
            yield
            return
        turn = self.join(name)
        try:
            if not turn.acquire(timeout=timeout):
                raise DeadlineExceededError
            try:
                yield
            finally:
                turn.release()
        finally:
            self.leave(name)

    def join(self, name: str) -> threading.Lock:
        with self.lock:
            turn, wanted = self.by_name.get(name, (threading.Lock(), 0))
            self.by_name[name] = (turn, wanted + 1)
            return turn

    def leave(self, name: str) -> None:
        with self.lock:
            turn, wanted = self.by_name.pop(name)
            if wanted > 1:
                self.by_name[name] = (turn, wanted - 1)
