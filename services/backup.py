"""Backup and restore: a copy of the whole database, as it was when the backup began.

A backup is made beside a running service and looked over before it gets its name; a restore only
ever fills a database that is empty. SQLite's way is in ``sqlite_backup.py``, PostgreSQL's and
MySQL's in ``server_backup.py``.
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from sqlalchemy.exc import DBAPIError

from database import Database, transaction
from errors import CommandError
from repositories import leases, transfer
from services import server_backup, sqlite_backup

Progress = Callable[[int, int], None]  # how far it has come, of how much


def back_up(database: Database, target: Path, progress: Progress) -> None:
    """Raises CommandError, and leaves no file under the target's name then."""
    if target.exists():
        raise CommandError(f"{target} is there already; a backup replaces nothing")
    if not target.absolute().parent.is_dir():
        raise CommandError(f"there is no folder {target.absolute().parent}")
    draft = target.with_name(target.name + ".partial")
    draft.unlink(missing_ok=True)
    if database.file is not None:
        sqlite_backup.copy(database.file, draft, progress)
    else:
        server_backup.dump(database.url, draft)
    make_durable(draft)
    draft.rename(target)
    make_durable(target.absolute().parent)


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
    draft = file.with_name(file.name + ".partial")
    draft.unlink(missing_ok=True)
    sqlite_backup.copy_backup(source, draft, progress)
    make_durable(draft)
    draft.rename(file)
    make_durable(file.absolute().parent)


def make_durable(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
