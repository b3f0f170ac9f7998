"""Export: the history as newline-delimited JSON, in constant memory.

Conversations come first, then records, each by id, so that a line never needs a later one. It goes
in small batches and holds nothing in between: a service may run beside it.
"""

import fcntl
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from pydantic import BaseModel, JsonValue, ValidationError

from database import Database
from errors import CommandError
from models import Conversation, GenerationRecord, HistoryQuery
from repositories import transfer
from repositories.transfer import IdRange
from services.backup import make_durable
from services.helper import Helper
from services.lines import BrokenLineError, conversation_line, parse, record_line

BATCH_ROWS = 1000
BATCH_TEXT = 1 << 20  # characters; a batch is in memory several times over, in two processes
ALONE_BATCHES = 10  # a second process would hardly have started before so much is written
TAIL_BYTES = 1 << 16

Kind = type[Conversation] | type[GenerationRecord]
Progress = Callable[[int, int], None]  # how far it has come, of how much


@dataclass(frozen=True)
class Place:
    """The last record that an export holds, or, before there is one, the last conversation."""

    conversation: int = 0
    record: int | None = None


class Note(BaseModel):
    """What a file that is not whole yet is to hold: which records, through which id."""

    owner: str | None
    query: dict[str, JsonValue]
    through: int = 0


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
    for a file that is whole, that was begun with other filters, or that another export writes.
    """
    note = file.with_name(file.name + ".unfinished")
    asked = Note(owner=owner_id, query=query.model_dump(mode="json", exclude={"limit"}))
    with file.open("ab+") as out:
        hold(out)
        if note.exists():
            through = through_noted(note, asked)
        elif out.seek(0, os.SEEK_END):
            raise CommandError(f"{file} is there already, and is not an export that was cut off")
        else:
            through = last_id(database)
            write_note(note, asked.model_copy(update={"through": through}))
        place = last_place(out)
        for lines in export_lines(database, owner_id, query, place, through, progress):
            out.write(lines)
        out.flush()
        os.fsync(out.fileno())
        note.unlink()


def hold(out: BinaryIO) -> None:
    """Keep other exports out of the file; the system lets go when this process has ended."""
    try:
        fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CommandError(f"another export is writing {out.name} at this moment") from None


def through_noted(note: Path, asked: Note) -> int:
    """The last id of an export that was cut off. Raises CommandError."""
    try:
        noted = Note.model_validate_json(note.read_bytes())
    except ValidationError:
        raise CommandError(
            f"{note} cannot be read: remove it and {note.with_suffix('')}, and export again"
        ) from None
    if noted.model_copy(update={"through": 0}) != asked:
        raise CommandError(f"{note.with_suffix('')} was begun with other filters; see {note}")
    return noted.through


def write_note(note: Path, content: Note) -> None:
    """All of it or nothing, and before any line: a file without a note passes for whole."""
    draft = note.with_name(note.name + ".new")
    draft.write_bytes(content.model_dump_json().encode())
    make_durable(draft)
    draft.rename(note)
    make_durable(note.absolute().parent)


def last_id(database: Database, kind: Kind = GenerationRecord) -> int:
    with database.sessions() as session:
        return transfer.last_id(session, kind)


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
    yield from record_lines(database, owner_id, query, record, through, progress)
    progress(through, through)


def record_lines(
    database: Database,
    owner_id: str | None,
    query: HistoryQuery,
    after: int,
    through: int,
    progress: Progress,
) -> Iterator[bytes]:
    """In turns with a second process, which makes every other batch of a long export."""
    lines = partial(lines_between, database, GenerationRecord, owner_id, query)
    batches = id_batches(database, GenerationRecord, owner_id, query, after, through)
    for batch in itertools.islice(batches, ALONE_BATCHES):
        yield lines(batch)
        after = batch[1]
        progress(after, through)
    if after == through:
        return
    nothing = through, through
    url = database.url.render_as_string(hide_password=False)
    with Helper(exporting, url, database.timeout, owner_id, query) as helper:
        for mine, theirs in itertools.zip_longest(batches, batches, fillvalue=nothing):
            helper.ask(theirs)
            yield lines(mine)
            progress(mine[1], through)
            found: bytes | None = helper.answer()
            yield lines(theirs) if found is None else found
            progress(theirs[1], through)


def exporting(
    url: str, timeout: float, owner_id: str | None, query: HistoryQuery
) -> Callable[[IdRange], bytes]:
    return partial(lines_between, Database(url, timeout), GenerationRecord, owner_id, query)


def lines_between(
    database: Database, kind: Kind, owner_id: str | None, query: HistoryQuery, batch: IdRange
) -> bytes:
    """Raises CommandError that names the first row that cannot be read, and nothing of it."""
    try:
        return read_lines(database, kind, owner_id, query, batch)
    except Exception:
        damaged = first_unreadable(database, kind, owner_id, query, batch)
        if damaged is None:
            raise
    name = "record" if kind is GenerationRecord else "conversation"
    raise CommandError(f"{name} {damaged} cannot be read: what its row holds is damaged")


def read_lines(
    database: Database, kind: Kind, owner_id: str | None, query: HistoryQuery, batch: IdRange
) -> bytes:
    of_records = kind is GenerationRecord
    read = transfer.records_in if of_records else transfer.conversations_in
    with database.sessions() as session:
        rows = read(session, owner_id, query, batch)
    return b"".join(map(record_line if of_records else conversation_line, rows))


def first_unreadable(
    database: Database, kind: Kind, owner_id: str | None, query: HistoryQuery, batch: IdRange
) -> int | None:
    with database.sessions() as session:  # a database that is gone raises here
        ids = transfer.ids_in(session, kind, owner_id, query, batch)
    for id in ids:
        try:
            read_lines(database, kind, owner_id, query, (id - 1, id))
        except Exception:
            return id
    return None


def id_batches(
    database: Database,
    kind: Kind,
    owner_id: str | None,
    query: HistoryQuery,
    after: int,
    through: int,
) -> Iterator[IdRange]:
    """All ids after the one and to the other, cut where a batch is full."""
    count = BATCH_ROWS
    while after < through:
        with database.sessions() as session:
            found = transfer.extent(session, kind, owner_id, query, (after, through), count)
        if found.text > BATCH_TEXT and count > 1:
            count //= 2
            continue
        last = found.last if found.rows == count else through
        yield after, last
        after, count = last, min(2 * count, BATCH_ROWS)


def conversation_lines(
    database: Database, owner_id: str | None, query: HistoryQuery, after: int
) -> Iterator[bytes]:
    through = last_id(database, Conversation)
    for batch in id_batches(database, Conversation, owner_id, query, after, through):
        yield lines_between(database, Conversation, owner_id, query, batch)
