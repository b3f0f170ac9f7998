"""Import: what an export wrote comes in, in constant memory.

It goes in small batches and holds nothing in between: a service may run beside it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import BinaryIO

from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from database import Database, kind, transaction
from errors import CommandError
from models import Conversation, GenerationRecord
from repositories import transfer
from repositories.bulk import refuses_rows
from services.arriving import Arrivals, Arriving, Rows
from services.lines import BrokenLineError
from services.transfer import Progress

GAP_SECONDS = 0.007  # between batches: longer than other processes wait between two looks


@dataclass
class Imported:
    """What an import did: rows that came in, rows that were there, lines that were skipped."""

    records: int = 0
    conversations: int = 0
    present: int = 0
    broken: int = 0


class RefusedError(Exception):
    """The database does not take some row; the message says why and repeats nothing of it."""


class Importer:
    """Brings lines into a database. A row that is there already stays as it is.

    A row is known by its id, its owner and when it was created. A line that is broken, whose id
    another row has, whose conversation is not there, or that the database refuses, ends the import
    before it with a CommandError that names it; or it is told to ``skip`` and left out.
    """

    def __init__(self, database: Database, skip: Callable[[str], None] | None = None) -> None:
        self.database = database
        self.skip = skip
        self.imported = Imported()
        self.stored_at = 0.0
        drivername = database.url.drivername
        self.conversations = transfer.Loading(Conversation, drivername)
        self.records = transfer.Loading(GenerationRecord, drivername)

    def run(self, source: BinaryIO, progress: Progress, size: int = 0) -> Imported:
        """``progress`` is told the bytes that were read, of ``size``."""
        number = done = 0
        with Arrivals(source, self.database.url.drivername) as batches:
            for rows, read in batches:
                self.take(number, rows)
                number += len(rows)
                done += read
                progress(done, size)
        return self.imported

    def let_others_write(self) -> None:
        """Other processes look every 5 ms whether a SQLite file's lock is free."""
        if self.database.write_lock is not None:
            time.sleep(max(0.0, self.stored_at + GAP_SECONDS - time.monotonic()))

    def take(self, before: int, rows: Rows) -> None:
        """Some rows, after ``before`` lines: what comes before a broken line is stored."""
        try:
            sorting = self.store(before, rows)
        except RefusedError:
            self.take_again(before, rows)
        else:
            self.count(sorting)

    def take_again(self, before: int, rows: Rows) -> None:
        """In halves, down to the row that is refused.

        What was refused because another process took an id meanwhile comes in: it is looked up
        anew, and a row that is alone already is tried once more.
        """
        if len(rows) > 1:
            half = len(rows) // 2
            self.take(before, rows[:half])
            self.take(before + half, rows[half:])
            return
        try:
            sorting = self.store(before, rows)
        except RefusedError as error:
            sorting = Sorting(broken=[f"line {before + 1}: {error}"])
        self.count(sorting)

    def store(self, before: int, rows: Rows) -> "Sorting":
        """In one transaction. Raises RefusedError, and has stored nothing then."""
        self.let_others_write()
        sorting = Sorting()
        with self.database.sessions() as session, transaction(session):
            sorting.sort_out(session, rows, before, stop=self.skip is None)
            try:
                transfer.go_on_after(session, GenerationRecord, last_id(sorting.records))
                transfer.go_on_after(session, Conversation, last_id(sorting.conversations))
                self.conversations.add(session, sorting.conversations)
                self.records.add(session, sorting.records)
            except DBAPIError as error:
                if not refuses_rows(error):
                    raise
                session.invalidate()  # a server that refuses a packet has hung up as well
                raise RefusedError(f"the database refuses it ({kind(error)})") from None
        self.stored_at = time.monotonic()
        return sorting

    def count(self, sorting: "Sorting") -> None:
        self.imported.records += len(sorting.records)
        self.imported.conversations += len(sorting.conversations)
        self.imported.present += sorting.present
        for named in sorting.broken:
            if self.skip is None:
                raise CommandError(named)
            self.skip(named)
            self.imported.broken += 1


@dataclass
class Sorting:
    """Rows that are to come in, and the lines that are not, by name."""

    conversations: list[transfer.Ready] = field(default_factory=list)
    records: list[transfer.Ready] = field(default_factory=list)
    present: int = 0
    broken: list[str] = field(default_factory=list)

    def sort_out(self, session: Session, rows: Rows, before: int, stop: bool) -> None:
        """``stop`` at the first broken line, or leave them all out."""
        known = Known(session, [row for row in rows if isinstance(row, Arriving)])
        for number, row in enumerate(rows, before + 1):
            if row is None:
                continue
            try:
                if isinstance(row, BrokenLineError):
                    raise row
                self.sort_in(known, row)
            except BrokenLineError as error:
                self.broken.append(f"line {number}: {error}")
                if stop:
                    return

    def sort_in(self, known: "Known", row: Arriving) -> None:
        ready = known.place(row)
        if ready is None:
            self.present += 1
        elif row.kind is Conversation:
            self.conversations.append(ready)
        else:
            self.records.append(ready)


def last_id(rows: list[transfer.Ready]) -> int:
    return max((row.id for row in rows), default=0)


class Known:
    """The rows that a batch may meet in the database, or earlier in the batch."""

    def __init__(self, session: Session, rows: list[Arriving]) -> None:
        records = {row.id for row in rows if row.kind is GenerationRecord}
        conversations = {row.id for row in rows if row.kind is Conversation}
        threads = {row.conversation_id for row in rows if row.conversation_id is not None}
        sources = {row.source_id for row in rows if row.source_id is not None}
        self.texts = transfer.texts(session, sources)
        self.rows = {
            GenerationRecord: transfer.known(session, GenerationRecord, records | sources),
            Conversation: transfer.known(session, Conversation, conversations | threads),
        }

    def place(self, row: Arriving) -> transfer.Ready | None:
        """The row as it is to come in, and is known from now on; None if it is there already.

        Raises BrokenLineError where its id is another row's, or its conversation is not there.
        """
        there = self.rows[row.kind].get(row.id)
        if there == row.identity:
            return None
        if there is not None:
            raise BrokenLineError(f"another row has its id, {row.id}")
        self.check_thread(row)
        self.rows[row.kind][row.id] = row.identity
        ready = self.linked_or_own(row)
        if row.text is not None and ready is row.ready:  # others may show this text
            self.texts[row.id] = row.owner_id, *row.text
        return ready

    def linked_or_own(self, row: Arriving) -> transfer.Ready:
        """An answer from the cache holds no text where its source, with that text, is there."""
        source = row.source_id
        if row.linked is None or source is None or row.text is None:
            return row.ready
        same = self.texts.get(source) == (row.owner_id, *row.text)
        return row.linked if same and source in self.rows[GenerationRecord] else row.ready

    def check_thread(self, row: Arriving) -> None:
        thread = row.conversation_id
        if thread is None:
            return
        owner, _ = self.rows[Conversation].get(thread, (None, None))
        if owner != row.owner_id:
            raise BrokenLineError(f"its conversation, {thread}, is not there")
