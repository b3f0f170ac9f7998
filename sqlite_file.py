"""One SQLite file: its durable settings, its queue of writers, and what stops it from taking more.

* WAL with ``synchronous=FULL``: an acknowledged commit survives a power cut.
* A write transaction takes the write lock at once (BEGIN IMMEDIATE): a lock upgrade half-way
  ignores the busy timeout.
* Writers queue on one lock in the process and one lock file between processes: SQLite before
  3.51.3 can corrupt a WAL when two connections write and checkpoint at the same moment.
* The file is compared with the one opened at start, before each write and each connection: a
  deleted or replaced file would go on taking writes that nobody can read back.
* A file with a damaged page takes no more writes: they would bury what can still be saved.
"""

import contextlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from sqlalchemy import URL, Connection, Engine, ExceptionContext, event

from errors import StartError, StorageUnavailableError
from log import event as event_log
from words import record_words, title_words

log = logging.getLogger(__name__)

PRAGMAS = (
    "journal_mode=WAL",
    "synchronous=FULL",
    "foreign_keys=ON",
    "secure_delete=ON",  # what is deleted is overwritten
    "wal_autocheckpoint=250",  # pages; a commit that brings 1000 into the file takes 50 ms more
)
CHECK_PATIENCE_SECONDS = 5.0  # a start waits so long for the check of the file's pages


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


def set_up(connection: sqlite3.Connection) -> None:
    connection.isolation_level = None  # transactions begin in ``begin`` alone
    if connection.execute("PRAGMA page_count").fetchone() == (0,):
        # In a file that is not new it would have no effect but to ask for the write lock.
        connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
    for pragma in PRAGMAS:
        connection.execute(f"PRAGMA {pragma}")
    for function in (record_words, title_words):  # triggers call them; see repositories/search.py
        parameters = len(signature(function).parameters)
        connection.create_function(function.__name__, parameters, function, deterministic=True)


def begin(connection: Connection) -> None:
    if connection.get_execution_options().get("write", False):
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        return
    driver: Any = connection.connection.driver_connection
    driver.execute("BEGIN")  # waits for nothing and cannot fail: past all that SQLAlchemy does


def truncate_log(file: Path) -> bool:
    """Bring all of the write-ahead log into the file and empty it; False while it is being read."""
    with contextlib.closing(sqlite3.connect(file, timeout=0)) as connection:
        busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    return bool(busy == 0)


def vacuum(file: Path) -> None:
    """Write the whole file anew: deleted texts can be left in the gaps of its pages, where
    ``secure_delete`` does not reach them once SQLite has moved rows between pages.
    """
    with contextlib.closing(sqlite3.connect(file)) as connection:
        set_up(connection)
        connection.execute("PRAGMA auto_vacuum=INCREMENTAL")  # for a file that began without
        connection.execute("VACUUM")


class WriteLock:
    """Lets one writer at a time at a SQLite file, in this process and between processes.

    ``timeout`` is the longest that nothing moves: a writer waits for its turn as long as the
    queue before it gets shorter.
    """

    def __init__(self, file: Path, timeout: float) -> None:
        self.file = file
        self.path = str(file)  # each read and write looks at it
        self.timeout = timeout
        self.threads = threading.Lock()
        self.processes = FileLock(f"{file}.lock", poll_interval=0.005, thread_local=False)
        self.identity: tuple[int, int] | None = None
        self.damaged = False
        self.moved = time.monotonic()  # when a writer was last done

    @contextlib.contextmanager
    def hold(self, timeout: float | None = None) -> Iterator[None]:
        """Raises StorageUnavailableError when the lock is not had in time or the file is bad."""
        timeout = self.timeout if timeout is None else timeout
        self.queue(timeout)
        try:
            with self.processes.acquire(timeout=timeout):
                if self.damaged:
                    raise StorageUnavailableError
                self.check_identity()
                yield
                self.moved = time.monotonic()
        except Timeout:
            raise StorageUnavailableError from None
        finally:
            self.threads.release()

    def queue(self, timeout: float) -> None:
        """Wait for the turn among this process's writers."""
        deadline = time.monotonic() + timeout
        while not self.threads.acquire(timeout=max(0.0, deadline - time.monotonic())):
            if self.moved + timeout <= deadline:
                raise StorageUnavailableError
            deadline = self.moved + timeout

    def connect(self) -> sqlite3.Connection:
        """A connection to the file, which is made only before it is watched.

        Raises StorageUnavailableError where another file lies there: SQLite would mix the two.
        """
        self.check_identity()
        mode = "rwc" if self.identity is None else "rw"
        connection = sqlite3.connect(
            f"{self.file.absolute().as_uri()}?mode={mode}",
            uri=True,
            timeout=self.timeout,
            check_same_thread=False,
        )
        try:
            self.check_identity()
            set_up(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def watch(self) -> None:
        """From now on, only the file that is there today is read and written."""
        self.identity = self.found()

    def check_identity(self) -> None:
        if self.identity is not None and self.identity != self.found():
            raise StorageUnavailableError

    def found(self) -> tuple[int, int] | None:
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def set_damaged(self) -> None:
        if not self.damaged:
            self.damaged = True
            event_log(log, logging.ERROR, "the database file is damaged: restore a backup")


def watch_errors(engine: Engine, lock: WriteLock) -> None:
    """Whoever meets a damaged page, reading or writing, stops the writes."""

    def notice(context: ExceptionContext) -> None:
        if is_damage(context.original_exception):
            lock.set_damaged()

    event.listen(engine, "handle_error", notice)


def is_damage(error: BaseException) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_CORRUPT


def is_busy(error: BaseException) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY


class PageCheck:
    """Looks once over every page of a file, in a thread: a large file takes minutes."""

    def __init__(self, lock: WriteLock) -> None:
        self.lock = lock
        self.connection: sqlite3.Connection | None = None
        self.thread = threading.Thread(target=self.run, name="page check", daemon=True)

    def start(self, patience: float = CHECK_PATIENCE_SECONDS) -> None:
        """Returns when the check has ended, or goes on without the caller."""
        if self.lock.file.is_file():
            self.connection = sqlite3.connect(self.lock.file, check_same_thread=False)
            self.thread.start()
            self.thread.join(patience)

    def run(self) -> None:
        assert self.connection is not None
        try:
            with contextlib.closing(self.connection) as connection:
                verdict = connection.execute("PRAGMA quick_check(1)").fetchone()
                damaged = verdict != ("ok",)
        except sqlite3.Error as error:  # a file that is no database is for others to refuse
            damaged = is_damage(error)
        if damaged:
            self.lock.set_damaged()

    def stop(self) -> None:
        if self.connection is not None and self.thread.is_alive():
            self.connection.interrupt()
            self.thread.join()
