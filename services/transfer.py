"""Export and import: the history as newline-delimited JSON, in constant memory.

Conversations come first, then records, each by id, so that a line never needs a later one. Both
directions go in small batches and hold nothing in between: a service may run beside them.
"""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from database import Database, transaction
from errors import CommandError
from models import Conversation, GenerationRecord, HistoryQuery
from repositories import transfer
from services.lines import BrokenLineError, Incoming, conversation_line, parse, record_line

Values = dict[str, Any]
Rows = list[Incoming | BrokenLineError]

BATCH_ROWS = 500
BATCH_BYTES = 1 << 19
TAIL_BYTES = 1 << 16

Progress = Callable[[int, int], None]  # how far it has come, of how much


@dataclass(frozen=True)
class Place:
    """The last record that an export holds, or, before there is one, the last conversation."""

    conversation: int = 0
    record: int | None = None


def export_to(
    database: Database,
    out: BinaryIO,
    owner_id: str | None,
    query: HistoryQuery,
    progress: Progress,
) -> None:
    """Write every record that the query wants to a stream."""
    for lines in export_lines(database, owner_id, query, Place(), last_id(database), progress):
        out.write(lines)
    out.flush()


def export_file(
    database: Database, file: Path, owner_id: str | None, query: HistoryQuery, progress: Progress
) -> None:
    """Write them to a file; one that was cut off is continued after its last whole line.

    Beside a file that is not whole yet there is a note of what it is to hold. Raises CommandError
    for a file that is whole, or that was begun with other filters.
    """
    note = file.with_name(file.name + ".unfinished")
    asked = {"owner": owner_id, "query": query.model_dump(mode="json", exclude={"limit"})}
    if not note.exists():
        if file.exists():
            raise CommandError(f"{file} is there already, and is not an export that was cut off")
        through = last_id(database)
        write_note(note, asked | {"through": through})
    else:
        noted = json.loads(note.read_bytes())
        through = noted.pop("through")
        if noted != asked:
            raise CommandError(f"{file} was begun with other filters; see {note}")
    with file.open("ab+") as out:
        place = last_place(out)
        for lines in export_lines(database, owner_id, query, place, through, progress):
            out.write(lines)
        out.flush()
        os.fsync(out.fileno())
    note.unlink()


def write_note(note: Path, content: dict[str, object]) -> None:
    """All of it or nothing."""
    draft = note.with_name(note.name + ".new")
    draft.write_text(json.dumps(content))
    draft.rename(note)


def last_id(database: Database) -> int:
    with database.sessions() as session:
        return transfer.last_record(session)


def last_place(out: BinaryIO) -> Place:
    """Cut off what comes after the last whole line; where that line stands."""
    end = start_of_last_line(out, out.seek(0, os.SEEK_END))
    out.truncate(end)
    start = start_of_last_line(out, max(0, end - 1))
    out.seek(start)
    if not (line := out.read(end - start)):
        return Place()
    try:
        row = parse(line)
    except BrokenLineError:
        raise CommandError(f"{out.name} ends with a line that no export wrote") from None
    if row.kind is Conversation:
        return Place(conversation=row.id)
    return Place(record=row.id)


def start_of_last_line(out: BinaryIO, end: int) -> int:
    """The place after the last line feed before ``end``."""
    while end > 0:
        start = max(0, end - TAIL_BYTES)
        out.seek(start)
        found = out.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def export_lines(
    database: Database,
    owner_id: str | None,
    query: HistoryQuery,
    place: Place,
    through: int,
    progress: Progress,
) -> Iterator[bytes]:
    """Lines after a place, a batch at a time, to the record ``through``.

    A conversation is older than its records: those of all records through that one are there when
    the first is read.
    """
    record = place.record
    if record is None:
        yield from conversation_lines(database, owner_id, query, place.conversation)
        record = 0
    while True:
        with database.sessions() as session:
            rows = transfer.records_between(session, owner_id, query, record, through, BATCH_ROWS)
        if not rows:
            progress(through, through)
            return
        yield b"".join(map(record_line, rows))
        record = rows[-1].id
        progress(record, through)


def conversation_lines(
    database: Database, owner_id: str | None, query: HistoryQuery, after: int
) -> Iterator[bytes]:
    while True:
        with database.sessions() as session:
            rows = transfer.conversations_after(session, owner_id, query, after, BATCH_ROWS)
        if not rows:
            return
        yield b"".join(map(conversation_line, rows))
        after = rows[-1].id


@dataclass
class Imported:
    """What an import did: rows that came in, rows that were there, lines that were skipped."""

    records: int = 0
    conversations: int = 0
    present: int = 0
    broken: int = 0


class Importer:
    """Brings lines into a database. A row that is there already stays as it is.

    A row is known by its id, its owner and when it was created. A line that is broken, whose id
    another row has, or whose conversation is not there, ends the import before it with a
    CommandError that names it; or it is told to ``skip`` and left out.
    """

    def __init__(self, database: Database, skip: Callable[[str], None] | None = None) -> None:
        self.database = database
        self.skip = skip
        self.imported = Imported()

    def run(self, source: BinaryIO, progress: Progress, size: int = 0) -> Imported:
        """``progress`` is told the bytes that were read, of ``size``."""
        number = done = 0
        with ThreadPoolExecutor(1) as reader:  # one batch is read while another is stored
            coming = reader.submit(read_batch, source)
            while rows := (batch := coming.result()).rows:
                coming = reader.submit(read_batch, source)
                self.take(number, rows)
                number += len(rows)
                done += batch.size
                progress(done, size)
        return self.imported

    def take(self, before: int, rows: Rows) -> None:
        """One batch, after ``before`` lines: what comes before a broken line is stored."""
        sorting = Sorting()
        try:
            with self.database.sessions() as session, transaction(session):
                sorting.sort_out(session, rows, before, stop=self.skip is None)
                sorting.store(session)
        except IntegrityError:
            raise CommandError(
                f"lines {before + 1} to {before + len(rows)}: a running service took one of their"
                " ids meanwhile; import again to see which"
            ) from None
        self.count(sorting)

    def count(self, sorting: "Sorting") -> None:
        self.imported.records += len(sorting.records)
        self.imported.conversations += len(sorting.conversations)
        self.imported.present += sorting.present
        for named in sorting.broken:
            if self.skip is None:
                raise CommandError(named)
            self.skip(named)
            self.imported.broken += 1


@dataclass(frozen=True)
class Batch:
    """Lines that were read, and how many bytes they were."""

    rows: Rows
    size: int


def read_batch(source: BinaryIO) -> Batch:
    lines = source.readlines(BATCH_BYTES)
    return Batch([parsed(line) for line in lines], sum(map(len, lines)))


def parsed(line: bytes) -> Incoming | BrokenLineError:
    try:
        return parse(line)
    except BrokenLineError as error:
        return error


@dataclass
class Sorting:
    """Rows that are to come in, and the lines that are not, by name."""

    conversations: list[Values] = field(default_factory=list)
    records: list[Values] = field(default_factory=list)
    present: int = 0
    broken: list[str] = field(default_factory=list)

    def sort_out(self, session: Session, rows: Rows, before: int, stop: bool) -> None:
        """``stop`` at the first broken line, or leave them all out."""
        known = Known(session, [row for row in rows if isinstance(row, Incoming)])
        for number, row in enumerate(rows, before + 1):
            try:
                if isinstance(row, BrokenLineError):
                    raise row
                self.sort_in(known, row)
            except BrokenLineError as error:
                self.broken.append(f"line {number}: {error}")
                if stop:
                    return

    def sort_in(self, known: "Known", row: Incoming) -> None:
        if known.has(row):
            self.present += 1
        elif row.kind is Conversation:
            self.conversations.append(row.values)
        else:
            self.records.append(known.linked(row.values))

    def store(self, session: Session) -> None:
        transfer.add(session, Conversation, self.conversations)
        transfer.add(session, GenerationRecord, self.records)


def text_of(row: Incoming) -> tuple[str, str, str] | None:
    """Owner, prompt and completion of a record that is no answer from the cache."""
    if row.kind is Conversation or row.values["source_id"] is not None:
        return None
    return row.values["owner_id"], row.values["prompt"], row.values["completion"]


class Known:
    """The rows that a batch may meet in the database, or earlier in the batch."""

    def __init__(self, session: Session, rows: list[Incoming]) -> None:
        records = {row.id for row in rows if row.kind is GenerationRecord}
        conversations = {row.id for row in rows if row.kind is Conversation}
        threads = {row.values["conversation_id"] for row in rows if row.kind is GenerationRecord}
        sources = {source for row in rows if (source := row.values.get("source_id"))}
        self.texts = {row.id: text_of(row) for row in rows if row.id in sources}
        self.texts |= transfer.texts(session, sources)
        transfer.go_on_after(session, GenerationRecord, max(records, default=0))
        transfer.go_on_after(session, Conversation, max(conversations, default=0))
        self.rows = {
            GenerationRecord: transfer.known(session, GenerationRecord, records | sources),
            Conversation: transfer.known(session, Conversation, conversations | threads - {None}),
        }

    def has(self, row: Incoming) -> bool:
        """Whether it is there; if not, it is from now on. Raises BrokenLineError."""
        there = self.rows[row.kind].get(row.id)
        if there is not None and there != row.identity:
            raise BrokenLineError(f"another row has its id, {row.id}")
        if there is None:
            self.check_thread(row)
            self.rows[row.kind][row.id] = row.identity
        return there is not None

    def linked(self, values: Values) -> Values:
        """An answer from the cache holds no text where its source, with that text, is there."""
        source = values["source_id"]
        if source is None:
            return values
        same = self.texts.get(source) == (
            values["owner_id"],
            values["prompt"],
            values["completion"],
        )
        if same and source in self.rows[GenerationRecord]:
            return values | {"prompt": "", "completion": ""}
        return values | {"source_id": None}

    def check_thread(self, row: Incoming) -> None:
        thread = row.values.get("conversation_id")
        if thread is None:
            return
        owner, _ = self.rows[Conversation].get(thread, (None, None))
        if owner != row.values["owner_id"]:
            raise BrokenLineError(f"its conversation, {thread}, is not there")
