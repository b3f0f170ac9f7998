"""Small writes that come together are one transaction.

Generations that share the model's steps end in crowds, and their clients' next requests come in
crowds. A commit waits for the disk and for its turn on processors that the model keeps busy, some
6 ms: one after the other, a crowd of 32 would wait a fifth of a second.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sqlalchemy.orm import Session

from database import Database, transaction
from errors import StorageUnavailableError

Result = TypeVar("Result")


class SpoiltError(Exception):
    """A write of the crowd failed, so none of it was stored: try alone."""


@dataclass(frozen=True)
class Waiting:
    work: Callable[[Session], Any]
    row: int
    result: Future[Any] = field(default_factory=Future)


class Crowds:
    """One thread writes, each time all that is waiting then."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.waiting: deque[Waiting] = deque()
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="writer")

    def write(self, work: Callable[[Session], Result], row: int = 0) -> Result:
        """What ``work`` returns, once it is committed.

        ``row`` is the row that it changes, if it is there already. Raises SpoiltError;
        StorageUnavailableError, and then a server may have committed it all the same.
        """
        mine = Waiting(work, row)
        self.waiting.append(mine)
        self.writer.submit(self.write_waiting)
        result: Result = mine.result.result()
        return result

    def write_waiting(self) -> None:
        crowd = [self.waiting.popleft() for _ in range(len(self.waiting))]
        if crowd:
            # In the order of their rows, as checkpoints are: no two transactions wait in a circle.
            self.write_together(sorted(crowd, key=lambda waiting: waiting.row))

    def write_together(self, crowd: list[Waiting]) -> None:
        try:
            with self.database.sessions() as session, transaction(session):
                results = [waiting.work(session) for waiting in crowd]
        except Exception as error:
            for waiting in crowd:
                waiting.result.set_exception(for_each(error, crowd))
            return
        for waiting, result in zip(crowd, results, strict=True):
            waiting.result.set_result(result)


def for_each(error: Exception, crowd: list[Waiting]) -> Exception:
    if isinstance(error, StorageUnavailableError):
        return StorageUnavailableError()
    return error if len(crowd) == 1 else SpoiltError()
