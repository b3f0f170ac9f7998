"""Takes a person out: their records, the conversations that were theirs, and every trace of them.

What is deleted is overwritten in a SQLite file (``secure_delete``); here it also leaves the search
index's old segments, the gaps that SQLite leaves in pages, and the write-ahead log. PostgreSQL and
MySQL clear away deleted rows by themselves, a little later. Copies elsewhere, such as backups, are
their keeper's.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from database import Database, transaction
from engine.sampling import FinishReason
from errors import StorageUnavailableError
from log import event
from repositories import erasure, retention, search, space, usage
from services.live import Live
from services.retention import Pace

log = logging.getLogger(__name__)

MERGE_PAGES = 200
QUICK_BYTES = 1 << 29  # a file of that size is written anew in a few seconds


@dataclass
class Erased:
    """How much of a user was there.

    ``cleared``: nothing of it is left in a SQLite file. Where that file is large, remnants may be
    in it until an operator's ``erase`` writes it anew.
    """

    records: int = 0
    conversations: int = 0
    cleared: bool = True


def erase(
    database: Database,
    owner_id: str | None,
    user_id: str,
    running: Sequence[Live] = (),
    forget: Callable[[Sequence[str]], None] = lambda _: None,
    most_bytes: int | None = None,
) -> Erased:
    """``forget`` is told the cache's keys of what went. An owner of None is every owner.

    ``most_bytes`` is how large a SQLite file may be to be written anew; None sets no limit.

    Raises StorageUnavailableError: then some of it may be left, and to ask again goes on.
    """
    for live in running:
        if live.record.user_id == user_id and owner_id in (None, live.record.owner_id):
            live.generation.cancel(FinishReason.CANCELLED)
    erased, theirs = Erased(), erasure.of_user(owner_id, user_id)
    for condition in (retention.answered(theirs), theirs):
        take_out(database, condition, forget, erased)
    with database.sessions() as session, transaction(session):
        usage.forget_user(session, owner_id, user_id)
    erased.cleared = clear_away(database, most_bytes)
    event(log, logging.INFO, "user erased", records=erased.records)
    return erased


def take_out(
    database: Database,
    condition: retention.Condition,
    forget: Callable[[Sequence[str]], None],
    erased: Erased,
) -> None:
    pace = Pace()
    while True:
        with database.sessions() as session, transaction(session):
            began = time.monotonic()
            taken = erasure.take_out(session, condition, pace.rows)
        pace.took(time.monotonic() - began)
        forget(taken.cache_keys)
        erased.records += taken.records
        erased.conversations += taken.conversations
        if not taken.seen:
            break


def clear_away(database: Database, most_bytes: int | None) -> bool:
    """Leave nothing of what was deleted in SQLite's files; False where the file is larger."""
    for index in (search.RECORDS, search.TITLES):
        first = True
        while merge_step(database, index, first):
            first = False
    cleared = database.vacuum(most_bytes)
    if not database.truncate_log():
        raise StorageUnavailableError(
            "Everything was deleted, but is still in the database's log: ask again shortly."
        )
    return cleared


def merge_step(database: Database, index: search.Index, first: bool) -> bool:
    """Part of a merge of the index's segments: deleted words go. Whether there is more to do."""
    with database.sessions() as session, transaction(session):
        began = time.monotonic()
        more = space.merge(session, index.name, -MERGE_PAGES if first else MERGE_PAGES)
    time.sleep(min(time.monotonic() - began, 0.05))
    return more
