"""Copies of a SQLite file by SQLite's backup API; a file copy under load would be torn."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from errors import CommandError

STEP_PAGES = 4096

Progress = Callable[[int, int], None]


def copy(file: Path, target: Path, progress: Progress) -> None:
    """Copy a database that others write to; raises CommandError unless the copy is whole.

    The read transaction keeps the state that is copied: without one, each write of another process
    would make the copy begin again.
    """
    try:
        with closing(read_only(file)) as source:
            source.execute("BEGIN")
            copy_state(source, target, progress)
    except sqlite3.Error as error:
        raise CommandError(f"{file} could not be copied ({error})") from error


def copy_backup(file: Path, target: Path, progress: Progress) -> None:
    """Copy a backup, which nobody writes to. Raises CommandError."""
    if Path(f"{file}-wal").exists():
        raise CommandError(f"{file} is a database in use, no backup")
    try:
        with closing(read_only(file, "&immutable=1")) as source:
            copy_state(source, target, progress)
    except sqlite3.Error as error:
        full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL  # not its fault
        verdict = "could not be copied" if full else "is no whole backup of a SQLite file"
        raise CommandError(f"{file} {verdict} ({error})") from error


def read_only(file: Path, options: str = "") -> sqlite3.Connection:
    """It checkpoints nothing when it is closed: that is the writers' to do."""
    return sqlite3.connect(
        f"{file.absolute().as_uri()}?mode=ro{options}", uri=True, isolation_level=None
    )


def copy_state(source: sqlite3.Connection, target: Path, progress: Progress) -> None:
    expected = count(source)
    with closing(sqlite3.connect(target, isolation_level=None)) as copied:
        source.backup(
            copied,
            pages=STEP_PAGES,
            progress=lambda _, remaining, total: progress(total - remaining, total),
        )
        verdict = copied.execute("PRAGMA integrity_check(1)").fetchone()
        if verdict != ("ok",) or count(copied) != expected:
            raise sqlite3.DatabaseError("the copy is not whole")


def count(connection: sqlite3.Connection) -> tuple[int, int]:
    """Records and conversations."""
    counts = [
        connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]  # noqa: S608
        for table in ("generation_records", "conversations")
    ]
    return counts[0], counts[1]
