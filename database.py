"""The engine, the sessions, the session dependency, and migrations at start.

A session only opens and closes here; services decide what is one transaction, with
``transaction(session)``. How connections are made is in ``connections.py``, what a SQLite file
needs in ``sqlite_file.py``.
"""

import contextlib
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from fastapi import Request
from filelock import FileLock, Timeout
from sqlalchemy import Connection, Engine, inspect, text
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    NoSuchModuleError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session, sessionmaker

from connections import normalise_url, open_engine, unsafe_commits
from errors import StartError, StorageUnavailableError
from log import event as event_log
from reader import Reader
from sqlite_file import PageCheck, WriteLock, database_file, truncate_log, vacuum

log = logging.getLogger(__name__)

FAILURES = (DBAPIError, PoolTimeoutError)
MIGRATIONS = Path(__file__).parent / "migrations"
MIGRATION_PATIENCE = 600.0  # seconds to wait for another process's migration
MIGRATION_LOCK = "ai-database-service-migration"


class Database:
    """One database: its connections, its write lock, its migrations.

    ``timeout`` is the longest wait for a lock or a connection, in seconds. ``unsafe_commits``
    takes a server on which a power cut may lose what was acknowledged.
    """

    def __init__(
        self,
        url: str,
        timeout: float = 5.0,
        pool_size: int | None = None,
        unsafe_commits: bool = False,
    ) -> None:
        try:
            self.url = normalise_url(url)
            self.file = database_file(self.url)
            self.write_lock = WriteLock(self.file, timeout) if self.file else None
            self.timeout = timeout
            self.engine = open_engine(self.url, self.write_lock, timeout, pool_size)
        except (ArgumentError, NoSuchModuleError, ValueError) as error:
            raise StartError(
                "DATABASE_URL is not usable: it takes a SQLite file, PostgreSQL or MySQL, as in"
                " sqlite:///ai_service.db or postgresql://user:password@host/name"
            ) from error
        self.unsafe_commits = unsafe_commits
        self.page_check = PageCheck(self.write_lock) if self.write_lock else None
        self.sessions = sessionmaker(
            self.engine, expire_on_commit=False, info={"write_lock": self.write_lock}
        )
        self.reader = Reader(self.url, self.sessions, self.write_lock, timeout)

    @property
    def damaged(self) -> bool:
        """Whether a page of the file was found damaged: it is read from, but takes no writes."""
        return self.write_lock is not None and self.write_lock.damaged

    def open(self) -> None:
        """Look whether it can be trusted, and bring it to this version. Raises StartError."""
        if self.page_check is not None:
            self.page_check.start()
        if not self.damaged:
            self.migrate()
            self.reader.connect()

    def migrate(self) -> None:
        """Bring the schema to this version, one process at a time. Raises StartError."""
        try:
            if not self.unsafe_commits and (reason := unsafe_commits(self.engine)):
                raise StartError(
                    "DATABASE_URL names a server that may lose what it acknowledged"
                    f" ({reason}): change that, or set DATABASE_UNSAFE_COMMITS=true"
                )
            with self.migrating() as connection:
                config = Config()
                config.set_main_option("script_location", str(MIGRATIONS))
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
            if self.write_lock is not None:
                self.write_lock.watch()
        except CommandError:
            raise StartError(
                "DATABASE_URL names a database of a newer version of this service"
            ) from None
        except (DBAPIError, OSError, StorageUnavailableError) as error:
            raise StartError(
                f"DATABASE_URL is not usable: the database cannot be opened or written"
                f" ({kind(error)})"
            ) from error

    @contextlib.contextmanager
    def migrating(self) -> Iterator[Connection]:
        """A connection that may change the schema, held by one process at a time."""
        if self.write_lock is not None:
            with self.write_lock.hold(MIGRATION_PATIENCE), self.engine.connect() as connection:
                driver: Any = connection.connection.driver_connection
                driver.execute("PRAGMA foreign_keys=OFF")  # or a dropped table takes others' rows
                try:
                    yield connection.execution_options(write=True)
                finally:
                    connection.rollback()
                    driver.execute("PRAGMA foreign_keys=ON")
            return
        patient = open_engine(self.url, None, MIGRATION_PATIENCE, pool_size=2)
        take, give = advisory_lock(patient)
        try:
            with patient.connect() as holder:
                if holder.scalar(text(take), {"key": MIGRATION_LOCK}) in (0, None):
                    raise StorageUnavailableError
                try:
                    with patient.connect() as connection:
                        yield connection
                finally:
                    holder.execute(text(give), {"key": MIGRATION_LOCK})
        finally:
            patient.dispose()

    def expect_schema(self) -> None:
        """Look that the database is there and of this version. Raises StartError."""
        if self.file is not None and not self.file.exists():
            raise StartError("DATABASE_URL names a file that is not there: `migrate` makes it")
        try:
            with self.engine.connect() as connection:
                found = MigrationContext.configure(connection).get_current_revision()
        except DBAPIError as error:
            raise unreadable(error) from error
        if found != ScriptDirectory(str(MIGRATIONS)).get_current_head():
            raise StartError("DATABASE_URL names a database of another version: see `migrate`")
        if self.write_lock is not None:
            self.write_lock.watch()

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[bool]:
        """Whether this is the only one of all processes that is at something, for the block."""
        if self.file is not None:
            lock = FileLock(f"{self.file}.{name}.lock", thread_local=False)
            try:
                with lock.acquire(timeout=0):
                    yield True
            except Timeout:
                yield False
            return
        take, give = advisory_lock(self.engine, wait=False)
        key = {"key": f"{name}/{self.url.database}"}
        with self.engine.connect() as holder:
            holder = holder.execution_options(isolation_level="AUTOCOMMIT")
            taken = bool(holder.scalar(text(take), key))
            try:
                yield taken
            finally:
                if taken:
                    holder.execute(text(give), key)

    def truncate_log(self) -> bool:
        """Empty a SQLite file's write-ahead log; False when readers did not let it in time.

        Raises StorageUnavailableError.
        """
        if self.write_lock is None:
            return True
        deadline = time.monotonic() + self.write_lock.timeout
        while time.monotonic() < deadline:
            with self.write_lock.hold(), refused():
                if truncate_log(self.write_lock.file):
                    return True
            time.sleep(0.05)
        return False

    def vacuum(self, most_bytes: int | None) -> bool:
        """Write a SQLite file anew, unless it is larger; nobody else writes meanwhile.

        Raises StorageUnavailableError.
        """
        if self.write_lock is None:
            return True
        if most_bytes is not None and self.write_lock.file.stat().st_size > most_bytes:
            return False
        with self.write_lock.hold(), refused():
            vacuum(self.write_lock.file)
        return True

    def is_empty(self) -> bool:
        """Whether it has no tables. Raises StartError."""
        try:
            return not inspect(self.engine).get_table_names()
        except DBAPIError as error:
            raise unreadable(error) from error

    def close(self) -> None:
        if self.page_check is not None:
            self.page_check.stop()
        self.reader.close()
        self.engine.dispose()


def unreadable(error: DBAPIError) -> StartError:
    return StartError(f"DATABASE_URL is not usable: the database cannot be read ({kind(error)})")


def advisory_lock(engine: Engine, wait: bool = True) -> tuple[str, str]:
    """How to take a lock by a key, and how to give it back; what is not taken gives a false."""
    if engine.dialect.name == "postgresql":
        take = "pg_advisory_lock" if wait else "pg_try_advisory_lock"
        return f"SELECT {take}(hashtext(:key))", "SELECT pg_advisory_unlock(hashtext(:key))"
    seconds = MIGRATION_PATIENCE if wait else 0
    return f"SELECT GET_LOCK(:key, {seconds:.0f})", "SELECT RELEASE_LOCK(:key)"


@contextlib.contextmanager
def transaction(session: Session) -> Iterator[None]:
    """One write transaction: all of it is durable when the block has ended, or none of it.

    The session must not be inside a transaction already. Raises StorageUnavailableError.
    """
    lock: WriteLock | None = session.info["write_lock"]
    with lock.hold() if lock is not None else contextlib.nullcontext():
        try:
            session.connection(execution_options={"write": True})
            yield
            session.commit()
        except FAILURES as error:
            session.rollback()
            if isinstance(error, IntegrityError):
                raise  # a constraint's refusal is an answer
            event_log(log, logging.ERROR, "database refused a write", error=kind(error))
            raise StorageUnavailableError from error
        except BaseException:
            session.rollback()
            raise


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """What SQLite itself refuses of a write: a full disk, say. Raises StorageUnavailableError."""
    try:
        yield
    except sqlite3.Error as error:
        event_log(log, logging.ERROR, "database refused a write", error=kind(error))
        raise StorageUnavailableError from error


def release(session: Session) -> None:
    """End a read: the connection goes back to the pool, what was read stays as it was read."""
    session.commit()
    session.expunge_all()


def kind(error: Exception) -> str:
    """An error's class, its driver's where there is one: all of it that may be shown."""
    return type(getattr(error, "orig", None) or error).__name__


async def get_db(request: Request) -> AsyncIterator[Session]:
    """A session for one request. Reads may use it as it is; writes need ``transaction``.

    On the event loop: to open a session does nothing yet, nor to close one that was released.
    """
    database: Database = request.app.state.database
    session = database.sessions()
    try:
        yield session
    finally:
        if session.in_transaction():
            with anyio.CancelScope(shield=True):  # in a thread of its own: all may wait for this
                await anyio.to_thread.run_sync(session.close, limiter=anyio.CapacityLimiter(1))
        else:
            session.close()
