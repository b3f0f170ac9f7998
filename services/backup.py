"""Backup and restore: a copy of the whole database, as it was when the backup began.

A backup is made beside a running service and looked over before it gets its name; a restore only
ever fills a database that is empty. SQLite's way is in ``sqlite_backup.py``, PostgreSQL's and
MySQL's in ``server_backup.py``.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from sqlalchemy.exc import DBAPIError

from database import Database, transaction
from errors import CommandError
from repositories import leases, transfer
from services import server_backup, sqlite_backup

Progress = Callable[[int, int], None]  # how far it has come, of how much


def back_up(database: Database, target: Path, progress: Progress) -> None:
    """Raises CommandError, and leaves no file under the target's name then."""
    refuse_existing(target)
    if not target.absolute().parent.is_dir():
        raise CommandError(f"there is no folder {target.absolute().parent}")
    with drafted(target) as draft:
        if database.file is not None:
            sqlite_backup.copy(database.file, draft, progress)
        else:
            server_backup.dump(database.url, draft)


def restore(database: Database, source: Path, progress: Progress) -> int:
    """Fill an empty database; how many records it has then. Raises CommandError.

    Whatever was in progress when the backup began is closed when a service starts: the leases of
    the processes that ran it stay behind.
    """
    if not source.is_file():
        raise CommandError(f"there is no file {source}")
    if database.file is not None:
        restore_file(database.file, source, progress)
    else:
        if not database.is_empty():
            raise CommandError("the database has tables already; a restore fills an empty one")
        load(database, source)
    with database.sessions() as session:
        with transaction(session):
            leases.clear(session)
        return transfer.count_records(session)


def load(database: Database, source: Path) -> None:
    """What is left by a load that fails goes, so that a sound one finds the database empty."""
    try:
        server_backup.load(database.url, source)
    except BaseException:
        with contextlib.suppress(DBAPIError), database.sessions() as session:
            transfer.drop_tables(session)
        raise


def restore_file(file: Path, source: Path, progress: Progress) -> None:
    there = [path for path in (file, Path(f"{file}-wal")) if path.exists()]
    if there:
        raise CommandError(f"{there[0]} is there already; a restore replaces nothing")
    with drafted(file) as draft:
        sqlite_backup.copy_backup(source, draft, progress)


@contextlib.contextmanager
def drafted(target: Path) -> Iterator[Path]:
    """An empty file that gets the target's name when the block has ended; else nothing stays of it.

    Raises CommandError where another process writes it, or was done sooner.
    """
    draft = target.with_name(target.name + ".partial")
    with contextlib.suppress(FileNotFoundError), draft.open("rb") as left:
        hold(left)
        draft.unlink()  # not emptied: a killed backup's pg_dump may go on writing to it
    with draft.open("xb") as new:
        hold(new)
        try:
            refuse_existing(target)
            yield draft
            make_durable(draft)
            refuse_existing(target)
            draft.rename(target)
        except BaseException:
            for path in (draft, Path(f"{draft}-journal")):
                path.unlink(missing_ok=True)
            raise
    make_durable(target.absolute().parent)


def hold(file: BinaryIO) -> None:
    """Keep other processes from it; the system lets go of it when this one is dead.

    Raises CommandError where another was sooner.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except (BlockingIOError, FileNotFoundError):
        mine = False
    if not mine:
        raise CommandError(f"another process writes {file.name} at this moment")


def refuse_existing(target: Path) -> None:
    if target.exists():
        raise CommandError(f"{target} is there already; nothing is replaced")


def make_durable(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
