"""How long a request may wait for others, all its waits together, and its place meanwhile."""

import time
from threading import Semaphore
from types import TracebackType
from typing import Self

from errors import OverloadedError


class Patience:
    """Of one request: ``seconds`` from now until its deadline.

    The first of its waits takes one of the ``places``, for whoever waits is a thread that serves no
    other request. It is kept until the block ends, so who has waited is not refused later on.
    """

    def __init__(self, seconds: float, places: Semaphore) -> None:
        self.deadline = time.monotonic() + seconds
        self.places = places
        self.has_place = False

    def left(self) -> float:
        """Seconds until the deadline, 0 after it."""
        return max(0.0, self.deadline - time.monotonic())

    def to_wait(self) -> float:
        """Seconds that are left, asked before each wait. Raises OverloadedError."""
        if not self.has_place and not self.places.acquire(blocking=False):
            raise OverloadedError
        self.has_place = True
        return self.left()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.has_place:
            self.places.release()
            self.has_place = False
