"""Small writes that come together are one transaction.

Generations that share the model's steps end in crowds, and their clients' next requests come in
crowds. A commit waits for the disk and for its turn on processors that the model keeps busy, some
6 ms: one after the other, a crowd of 32 would wait a fifth of a second. What is alike is also one
statement: to run one takes SQLAlchemy longer than the database.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from sqlalchemy.orm import Session

from database import Database, transaction
from errors import StorageUnavailableError

# Who waits goes on in a thread of its own: a hundred of them at once would hold up the event loop
# and the model, who are but two among them.
MOST_TOGETHER = 16

Item = TypeVar("Item")
Result = TypeVar("Result")


class SpoiltError(Exception):
    """A write of the crowd failed, so none of it was stored: try alone."""


WriteAll = Callable[[Session, list[Item]], Sequence[Result]]


@dataclass(frozen=True)
class Waiting:
    write_all: WriteAll[Any, Any]
    item: Any
    row: int
    result: Future[Any] = field(default_factory=Future)


class Crowds:
    """One thread writes, each time what is waiting then, up to ``MOST_TOGETHER``."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.waiting: SimpleQueue[Waiting] = SimpleQueue()
        Thread(target=self.run, name="writer", daemon=True).start()

    def write(self, write_all: WriteAll[Item, Result], item: Item, row: int = 0) -> Result:
        """What ``write_all`` returns for ``item``, once it is committed.

        ``write_all`` gets the items of all who wait with it, and returns as many results. ``row``
        is the row that is changed, if it is there already. Raises SpoiltError;
        StorageUnavailableError, and then a server may have committed it all the same.
        """
        mine = Waiting(write_all, item, row)
        self.waiting.put(mine)
        result: Result = mine.result.result()
        return result

    def run(self) -> None:
        while True:
            crowd = [self.waiting.get()]
            with suppress(Empty):
                while len(crowd) < MOST_TOGETHER:
                    crowd.append(self.waiting.get_nowait())
            # In the order of their rows, as checkpoints are: no two transactions wait in a circle.
            self.write_together(sorted(crowd, key=lambda waiting: waiting.row))

    def write_together(self, crowd: list[Waiting]) -> None:
        alike: defaultdict[WriteAll[Any, Any], list[Waiting]] = defaultdict(list)
        for waiting in crowd:
            alike[waiting.write_all].append(waiting)
        try:
            with self.database.sessions() as session, transaction(session):
                results = {
                    write_all: write_all(session, [waiting.item for waiting in group])
                    for write_all, group in alike.items()
                }
        except Exception as error:
            for waiting in crowd:
                waiting.result.set_exception(for_each(error, crowd))
            return
        for write_all, group in alike.items():
            for waiting, result in zip(group, results[write_all], strict=True):
                waiting.result.set_result(result)


def for_each(error: Exception, crowd: list[Waiting]) -> Exception:
    if isinstance(error, StorageUnavailableError):
        return StorageUnavailableError()
    return error if len(crowd) == 1 else SpoiltError()
