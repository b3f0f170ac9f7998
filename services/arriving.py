"""Lines that come in, read and made ready for the database batch by batch, ahead of their turn.

To read a line, to make its words and to bind its row costs as much as to write it and needs no
database: a long import has a second process for it. The first does the work itself until the other
has started, and again should it die.
"""

import codecs
import contextlib
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, BinaryIO, NamedTuple, Self

from models import Conversation, GenerationRecord
from repositories.transfer import Loading, Ready
from services.helper import Helper, uncollected
from services.lines import BrokenLineError, parse

BATCH_BYTES = 1 << 21  # some 2,000 records, a tenth of a second
ALONE_BYTES = 1 << 22  # a second process would hardly have started before so much is done

Text = tuple[str, str]


class Arriving(NamedTuple):
    """A line, ready as a row with a text of its own, and as one that shows its source's text."""

    kind: type[Conversation] | type[GenerationRecord]
    id: int
    owner_id: str
    created_at: datetime
    conversation_id: int | None
    source_id: int | None
    text: Text | None  # prompt and completion
    ready: Ready
    linked: Ready | None

    @property
    def identity(self) -> tuple[str, datetime]:
        """What tells it, beside its id, from another row."""
        return self.owner_id, self.created_at


Rows = list[Arriving | BrokenLineError | None]  # None is a blank line


class Preparing:
    """Lines in, rows for one kind of database out."""

    def __init__(self, drivername: str) -> None:
        self.conversations = Loading(Conversation, drivername)
        self.records = Loading(GenerationRecord, drivername)

    def batch(self, lines: list[bytes]) -> Rows:
        with uncollected():
            return [self.arriving(line) for line in lines]

    def arriving(self, line: bytes) -> Arriving | BrokenLineError | None:
        if not line.strip():
            return None
        try:
            row = parse(line)
        except BrokenLineError as error:
            return error
        of_conversation = row.kind is Conversation
        make = self.conversations.ready if of_conversation else self.records.ready
        values, linked = row.values, None
        source = values.get("source_id")
        if source is not None:
            linked = make(values | {"prompt": "", "completion": ""})
            values = values | {"source_id": None}
        return Arriving(
            row.kind,
            row.id,
            *row.identity,
            values.get("conversation_id"),
            source,
            None if of_conversation else (row.values["prompt"], row.values["completion"]),
            make(values),
            linked,
        )


def preparing(drivername: str) -> Callable[[list[bytes]], Rows]:
    return Preparing(drivername).batch


class Arrivals:
    """The batches of a file or a stream, and how many bytes each was.

    One is prepared while the one before it is stored.
    """

    def __init__(self, source: BinaryIO, drivername: str) -> None:
        self.source = source
        self.drivername = drivername
        self.preparing = Preparing(drivername)
        self.helper: Helper | None = None
        self.until_the_end = contextlib.ExitStack()
        self.bytes_read = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.until_the_end.close()

    def __iter__(self) -> Iterator[tuple[Rows, int]]:
        coming = self.read()
        while lines := coming:
            rows: Rows | None = None if self.helper is None else self.helper.answer()
            coming = self.read()
            yield self.preparing.batch(lines) if rows is None else rows, sum(map(len, lines))

    def read(self) -> list[bytes]:
        """The next lines; on their way to the helper, where there is one."""
        lines = self.source.readlines(BATCH_BYTES)
        if lines and not self.bytes_read:
            lines[0] = lines[0].removeprefix(codecs.BOM_UTF8)  # some editors begin a file with it
        self.bytes_read += sum(map(len, lines))
        if self.helper is None and self.bytes_read > ALONE_BYTES:
            self.helper = self.until_the_end.enter_context(Helper(preparing, self.drivername))
        if self.helper is not None and lines:
            self.helper.ask(lines)
        return lines
