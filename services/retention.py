"""How long things stay: old texts and old records go, a few at a time.

The one process of many that gets to it does the work. Whatever a batch removed is removed; a run
that is cut off leaves nothing half done, and the next one goes on. How records hang together
decides what goes with them: see docs/decisions.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import partial

from sqlalchemy.orm import Session

from database import Database, release, transaction
from log import event
from repositories import retention, search, space
from repositories.retention import Condition

log = logging.getLogger(__name__)

RETENTION_SECONDS = 300.0
LOOK_AGAIN_SECONDS = 86_400.0  # at blocks of which everything is done: a pin may be gone
BATCH_SECONDS = 0.01  # how long a batch should hold up writers
LEAST_ROWS = 8  # fewer would not make a batch on a slow disk shorter: its commit is the most of it
MOST_ROWS = 32  # more, and a merge of the search index in between takes much longer
VACUUM_PAGES = 64
MERGED_PAGES = 32  # of the search index after a batch: some more than it would merge by itself


@dataclass(frozen=True)
class Limits:
    """What was created before goes; None keeps it."""

    records: datetime | None = None
    texts: datetime | None = None

    @classmethod
    def of(cls, days: int | None, body_days: int | None) -> "Limits":
        now = datetime.now(UTC)
        return cls(*(None if n is None else now - timedelta(days=n) for n in (days, body_days)))


@dataclass
class Removed:
    """How much went: records, texts of records that stay, conversations, titles of such."""

    records: int = 0
    texts: int = 0
    conversations: int = 0
    titles: int = 0


def count(database: Database, limits: Limits) -> Removed:
    """What a run would remove if nothing changed until then."""
    found = Removed()
    with database.sessions() as session:
        titles = retention.losing_title(limits.records, limits.texts)
        found.titles = retention.count_conversations(session, titles)
        if limits.records is not None:
            old = retention.older(limits.records)
            found.records = count_records(session, limits.records, old)
            left = retention.left_over(limits.records, old)
            found.conversations = retention.count_conversations(session, left)
        if limits.texts is not None:
            texts = retention.has_old_text(limits.texts, limits.records)
            found.texts = count_records(session, limits.texts, texts)
    return found


def count_records(session: Session, before: datetime, condition: Condition) -> int:
    ranges = retention.id_ranges(retention.old_blocks(session, before))
    return sum(retention.count_records(session, ids, condition) for ids in ranges)


class Pace:
    """How many rows a batch takes, so that it holds up writers no longer than it should."""

    def __init__(self) -> None:
        self.rows = 16

    def took(self, seconds: float) -> None:
        """After a batch: fit the next one, and let others have a turn."""
        fitting = int(self.rows * BATCH_SECONDS / max(seconds, 1e-4))
        self.rows = max(LEAST_ROWS, min(fitting, 2 * self.rows, MOST_ROWS))
        time.sleep(max(seconds, BATCH_SECONDS))


class Retention:
    """Removes what has been kept long enough, beside everything else that goes on."""

    def __init__(self, database: Database, days: int | None, body_days: int | None) -> None:
        self.database = database
        self.days = days
        self.body_days = body_days
        self.stopping = threading.Event()
        self.without_texts: set[int] = set()  # blocks to which nothing is left to do
        self.looked_at_all = time.monotonic()

    def tick(self) -> None:
        if self.days is None and self.body_days is None:
            return
        if time.monotonic() - self.looked_at_all > LOOK_AGAIN_SECONDS:
            self.without_texts.clear()
            self.looked_at_all = time.monotonic()
        self.run(Limits.of(self.days, self.body_days))

    def stop(self) -> None:
        """Let a run end after the batch it is at."""
        self.stopping.set()

    def run(self, limits: Limits) -> Removed | None:
        """None when another process is at it. Raises StorageUnavailableError."""
        with self.database.alone("retention") as alone:
            if not alone:
                return None
            removed = Removed()
            self.remove_titles(limits, removed)
            if limits.records is not None:
                self.remove_records(limits.records, removed)
            if limits.texts is not None:
                self.remove_texts(limits.texts, limits.records, removed)
            self.give_space_back()
        if removed != Removed():
            event(log, logging.INFO, "removed what was kept long enough", **asdict(removed))
        return removed

    def remove_titles(self, limits: Limits, removed: Removed) -> None:
        """Before what they were made of: then it can be told which those are."""
        titles = retention.losing_title(limits.records, limits.texts)
        removed.titles = self.in_batches(
            partial(retention.conversation_ids, condition=titles),
            partial(retention.remove_titles, condition=titles),
        )

    def remove_records(self, before: datetime, removed: Removed) -> None:
        """And the conversations that hold none any more."""
        old = retention.older(before)
        with self.database.sessions() as session:
            blocks = retention.old_blocks(session, before)
        ranges = retention.id_ranges(blocks)
        for condition in (retention.answered(old), old):
            for ids in ranges:
                removed.records += self.in_batches(
                    partial(retention.record_ids, ids=ids, condition=condition),
                    partial(retention.remove, condition=condition),
                )
        left = retention.left_over(before)
        removed.conversations += self.in_batches(
            partial(retention.conversation_ids, condition=left),
            partial(retention.remove_conversations, condition=left),
        )

    def remove_texts(self, before: datetime, since: datetime | None, removed: Removed) -> None:
        old = retention.has_old_text(before, since)
        with self.database.sessions() as session:
            blocks = retention.old_blocks(session, before)
            done = retention.wholly_old_blocks(session, before)
        left = [block for block in blocks if block not in self.without_texts]
        ranges = retention.id_ranges(left)
        for condition in (retention.answered(old), old):
            for ids in ranges:
                removed.texts += self.in_batches(
                    partial(retention.record_ids, ids=ids, condition=condition),
                    partial(retention.remove_texts, condition=condition, now=datetime.now(UTC)),
                )
        if not self.stopping.is_set():
            self.without_texts |= done

    def in_batches(
        self, find: Callable[..., list[int]], remove: Callable[[Session, list[int]], int]
    ) -> int:
        """Find ids and remove what is there, until there is none left or a stop is asked for."""
        pace, total, above = Pace(), 0, 0
        while not self.stopping.is_set():
            with self.database.sessions() as session:
                ids = find(session, above=above, count=pace.rows)
                release(session)
                if not ids:
                    break
                with transaction(session):
                    began = time.monotonic()
                    with search.unmerged(session):
                        total += remove(session, ids)
            pace.took(time.monotonic() - began)
            self.merge()
            above = ids[-1]
        return total

    def merge(self) -> None:
        """What a batch left in the index of a SQLite file, apart from it and a little at a time."""
        if self.database.file is not None:
            with self.database.sessions() as session, transaction(session):
                search.merge(session, MERGED_PAGES)
            time.sleep(BATCH_SECONDS)

    def give_space_back(self) -> None:
        while not self.stopping.is_set():
            with self.database.sessions() as session:
                free = space.free_pages(session)
                release(session)
                if not free:
                    break
                with transaction(session):
                    began = time.monotonic()
                    space.give_back(session, VACUUM_PAGES)
            time.sleep(max(time.monotonic() - began, BATCH_SECONDS))
