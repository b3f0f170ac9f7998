"""Runs the queries of one row that answer a request, each where it takes the least."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import anyio
import anyio.to_thread
from sqlalchemy import URL, Engine
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import Session, sessionmaker

from async_postgres import AsyncPostgres
from connections import READERS, open_reader
from errors import StorageUnavailableError
from lookup import Lookup
from sqlite_file import WriteLock, is_busy

Result = TypeVar("Result")


class Reader:
    """Reads for requests, without a transaction.

    In a SQLite file such a query takes less than to hand it to another thread, so it runs on the
    event loop, in a session that stays open; where it would have to wait for a lock it runs in a
    thread like everything else. For PostgreSQL the event loop itself waits. On MySQL, and on
    Windows, whose event loop psycopg cannot use, it runs in one of a few threads.
    """

    def __init__(
        self, url: URL, sessions: sessionmaker[Session], lock: WriteLock | None, timeout: float
    ) -> None:
        self.url = url
        self.sessions = sessions
        self.lock = lock  # of a SQLite file
        self.timeout = timeout
        self.session: Session | None = None  # the event loop's, in a SQLite file
        self.postgres: AsyncPostgres | None = None
        self.engine: Engine | None = None
        self.threads = anyio.CapacityLimiter(READERS)

    def connect(self) -> None:
        """Read by connections of its own; to connect may take a while."""
        self.engine = open_reader(self.url, self.lock, self.timeout)
        if self.lock is not None:
            self.session = Session(self.engine)
            self.session.connection()
            return
        self.sessions = sessionmaker(self.engine)
        if self.engine.dialect.name == "postgresql" and sys.platform != "win32":
            self.postgres = AsyncPostgres(self.url, self.timeout)

    async def row(self, lookup: Lookup, **given: Any) -> list[Any] | None:
        """The row that a query finds.

        Raises StorageUnavailableError where another file lies in the place of the one that is open,
        or when no connection or thread is free in time; DBAPIError.
        """
        if self.postgres is None:
            return await self.run(partial(lookup.row, **given))
        try:
            return await self.postgres.row(lookup, given)
        except TimeoutError:
            raise StorageUnavailableError from None

    async def run(self, query: Callable[[Session], Result]) -> Result:
        """What ``query`` returns of a session, on the event loop or in a thread; as ``row``."""
        if self.session is not None and self.lock is not None:
            self.lock.check_identity()
            try:
                return query(self.session)
            except OperationalError as error:
                if error.orig is None or not is_busy(error.orig):
                    raise
        try:
            with anyio.fail_after(self.timeout):  # of waiting for a thread: what runs is not ended
                return await anyio.to_thread.run_sync(self.run_here, query, limiter=self.threads)
        except TimeoutError:
            raise StorageUnavailableError from None

    def run_here(self, query: Callable[[Session], Result]) -> Result:
        """A read may be repeated: its connection may have died since the last one."""
        try:
            with self.sessions() as session:
                return query(session)
        except DBAPIError as error:
            if not error.connection_invalidated:
                raise
        with self.sessions() as session:
            return query(session)

    def close(self) -> None:
        if self.session is not None:
            self.session.close()
        if self.postgres is not None:
            self.postgres.close()
        if self.engine is not None:
            self.engine.dispose()
