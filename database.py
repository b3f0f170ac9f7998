"""The engine, the sessions, the session dependency, and migrations at start.

A session only opens and closes here; services decide what is one transaction, with
``transaction(session)``. SQLite's rules are kept in this file:

* WAL with ``synchronous=FULL``: an acknowledged commit survives a power cut.
* A write transaction takes the write lock at once (BEGIN IMMEDIATE): a lock upgrade half-way
  ignores the busy timeout.
* Writers queue on one lock in the process and one lock file between processes: fair, and SQLite
  before 3.51.3 can corrupt a WAL when two connections write and checkpoint at the same moment.
* The file is compared with the one opened at start: a deleted or replaced file would go on taking
  writes that nobody can read back.
"""

import contextlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.util.exc import CommandError
from fastapi import Request
from filelock import FileLock, Timeout
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session, sessionmaker

from errors import StartError, StorageUnavailableError
from log import event as event_log

log = logging.getLogger(__name__)

MIGRATIONS = Path(__file__).parent / "migrations"
MIGRATION_PATIENCE = 600.0  # seconds to wait for another process's migration
MIGRATION_LOCK = "ai-database-service-migration"
DRIVERS = {"postgres": "postgresql+psycopg", "postgresql": "postgresql+psycopg"} | {
    "mysql": "mysql+pymysql",
    "mariadb": "mariadb+pymysql",
}


def normalise_url(url: str) -> URL:
    """A URL as hosting platforms write it, with the driver this service ships."""
    parsed = make_url(url)
    parsed = parsed.set(drivername=DRIVERS.get(parsed.drivername, parsed.drivername))
    if parsed.get_backend_name() in ("mysql", "mariadb"):
        parsed = parsed.update_query_dict({"charset": "utf8mb4"})
    return parsed


class Database:
    """One database: its connections, its write lock, its migrations.

    ``timeout`` is the longest wait for a lock or a connection, in seconds.
    """

    def __init__(self, url: str, timeout: float = 5.0) -> None:
        try:
            self.url = normalise_url(url)
            self.file = database_file(self.url)
            self.engine = open_engine(self.url, self.file, timeout)
        except (ArgumentError, NoSuchModuleError, ValueError) as error:
            raise StartError(
                "DATABASE_URL is not usable: it takes a SQLite file, PostgreSQL or MySQL, as in"
                " sqlite:///ai_service.db or postgresql://user:password@host/name"
            ) from error
        self.write_lock = WriteLock(self.file, timeout) if self.file else None
        self.sessions = sessionmaker(
            self.engine, expire_on_commit=False, info={"write_lock": self.write_lock}
        )

    def migrate(self) -> None:
        """Bring the schema to this version, one process at a time. Raises StartError."""
        try:
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
                yield connection.execution_options(write=True)
            return
        take, give = advisory_lock(self.engine)
        with self.engine.connect() as holder:
            if holder.scalar(text(take), {"key": MIGRATION_LOCK}) in (0, None):
                raise StorageUnavailableError
            try:
                with self.engine.connect() as connection:
                    yield connection
            finally:
                holder.execute(text(give), {"key": MIGRATION_LOCK})

    def close(self) -> None:
        self.engine.dispose()


def database_file(url: URL) -> Path | None:
    """The SQLite file of a URL; None for a server. A folder is not made: it may be a typo."""
    if url.get_backend_name() != "sqlite":
        return None
    if not url.database or ":memory:" in url.database or url.database.startswith("file:"):
        raise ValueError("records are kept in a file")
    file = Path(url.database)
    if not file.absolute().parent.is_dir():
        raise StartError("DATABASE_URL is not usable: the folder of its file does not exist")
    return file


def open_engine(url: URL, file: Path | None, timeout: float) -> Engine:
    # Parameters are prompts and outputs: an exception must not carry them.
    options: dict[str, Any] = {"hide_parameters": True, "pool_size": 16, "max_overflow": 16}
    options |= {"pool_timeout": timeout}
    if file is None:
        return create_engine(url, pool_pre_ping=True, **options)
    engine = create_engine(url, connect_args={"timeout": timeout}, **options)
    event.listen(engine, "connect", set_up_sqlite)
    event.listen(engine, "begin", begin_sqlite)
    return engine


def set_up_sqlite(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None  # transactions begin in begin_sqlite alone
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def begin_sqlite(connection: Connection) -> None:
    write = connection.get_execution_options().get("write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def advisory_lock(engine: Engine) -> tuple[str, str]:
    if engine.dialect.name == "postgresql":
        return (
            "SELECT pg_advisory_lock(hashtext(:key))",
            "SELECT pg_advisory_unlock(hashtext(:key))",
        )
    return f"SELECT GET_LOCK(:key, {MIGRATION_PATIENCE:.0f})", "SELECT RELEASE_LOCK(:key)"


class WriteLock:
    """Lets one writer at a time at a SQLite file, in this process and between processes."""

    def __init__(self, file: Path, timeout: float) -> None:
        self.file = file
        self.timeout = timeout
        self.threads = threading.Lock()
        self.processes = FileLock(f"{file}.lock", poll_interval=0.005, thread_local=False)
        self.identity: tuple[int, int] | None = None

    @contextlib.contextmanager
    def hold(self, timeout: float | None = None) -> Iterator[None]:
        """Raises StorageUnavailableError when the lock is not had in time or the file is gone."""
        timeout = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + timeout
        if not self.threads.acquire(timeout=timeout):
            raise StorageUnavailableError
        try:
            with self.processes.acquire(timeout=max(0.0, deadline - time.monotonic())):
                self.check_identity()
                yield
        except Timeout:
            raise StorageUnavailableError from None
        finally:
            self.threads.release()

    def watch(self) -> None:
        """From now on, writes are refused when the path leads to another file than today."""
        status = os.stat(self.file)
        self.identity = (status.st_dev, status.st_ino)

    def check_identity(self) -> None:
        if self.identity is None:
            return
        try:
            status = os.stat(self.file)
        except OSError:
            raise StorageUnavailableError from None
        if (status.st_dev, status.st_ino) != self.identity:
            raise StorageUnavailableError


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
        except (OperationalError, InterfaceError, PoolTimeoutError) as error:
            event_log(log, logging.ERROR, "database refused a write", error=kind(error))
            session.rollback()
            raise StorageUnavailableError from error
        except BaseException:
            session.rollback()
            raise


def release(session: Session) -> None:
    """End a read: the connection goes back to the pool, what was read stays as it was read."""
    session.commit()
    session.expunge_all()


def kind(error: Exception) -> str:
    """An error's class, its driver's where there is one: all of it that may be shown."""
    return type(getattr(error, "orig", None) or error).__name__


def get_db(request: Request) -> Iterator[Session]:
    """A session for one request. Reads may use it as it is; writes need ``transaction``."""
    database: Database = request.app.state.database
    with database.sessions() as session:
        yield session
