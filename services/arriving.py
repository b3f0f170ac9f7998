"""Lines that come in, read and made ready for the database batch by batch, ahead of their turn.

To read a line, to make its words and to bind its row costs as much as to write it and needs no
database: a long import has a second process for it. That one lives no longer than the first, which
does the work itself until the other has started, and again should it die.
"""

import contextlib
import gc
import multiprocessing
import signal
from collections.abc import Iterator
from datetime import datetime
from multiprocessing.connection import Connection
from typing import Any, BinaryIO, NamedTuple, Self

from models import Conversation, GenerationRecord
from repositories.transfer import Loading, Ready
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


Rows = list[Arriving | BrokenLineError]


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Rows hold no cycles: while many are made, the collector would only look at them all again."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Preparing:
    """Lines in, rows for one kind of database out."""

    def __init__(self, drivername: str) -> None:
        self.conversations = Loading(Conversation, drivername)
        self.records = Loading(GenerationRecord, drivername)

    def batch(self, lines: list[bytes]) -> Rows:
        with uncollected():
            return [self.arriving(line) for line in lines]

    def arriving(self, line: bytes) -> Arriving | BrokenLineError:
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


class Helper:
    """A second process that prepares batches. It ends when its pipe does, however this one ends."""

    def __init__(self, drivername: str) -> None:
        spawning = multiprocessing.get_context("spawn")  # a fork would share our connections
        self.pipe, theirs = spawning.Pipe()
        self.process = spawning.Process(target=serve, args=(theirs, drivername), daemon=True)
        self.process.start()
        theirs.close()
        self.is_ready = False
        self.is_asked = False

    def ask(self, lines: list[bytes]) -> None:
        """Nothing happens while it starts, and when it is dead."""
        try:
            if not self.is_ready and self.pipe.poll():
                self.is_ready = self.pipe.recv()
            if self.is_ready:
                self.pipe.send(lines)
                self.is_asked = True
        except (EOFError, OSError):
            self.is_ready = False

    def answer(self) -> Rows | None:
        """The rows of the lines it was asked for last; None if it was not, or died."""
        if not self.is_asked:
            return None
        self.is_asked = False
        try:
            with uncollected():
                rows: Rows = self.pipe.recv()
            return rows
        except (EOFError, OSError):
            self.is_ready = False
            return None

    def stop(self) -> None:
        self.pipe.close()
        self.process.join()


def serve(pipe: Connection, drivername: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for us
    preparing = Preparing(drivername)
    gc.freeze()
    with contextlib.suppress(EOFError, OSError):  # the other end is gone
        pipe.send(True)
        while True:
            pipe.send(preparing.batch(pipe.recv()))


class Arrivals:
    """The batches of a file or a stream, and how many bytes each was.

    One is prepared while the one before it is stored.
    """

    def __init__(self, source: BinaryIO, drivername: str) -> None:
        self.source = source
        self.drivername = drivername
        self.preparing = Preparing(drivername)
        self.helper: Helper | None = None
        self.bytes_read = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.helper is not None:
            self.helper.stop()

    def __iter__(self) -> Iterator[tuple[Rows, int]]:
        coming = self.read()
        while lines := coming:
            rows = None if self.helper is None else self.helper.answer()
            coming = self.read()
            yield self.preparing.batch(lines) if rows is None else rows, sum(map(len, lines))

    def read(self) -> list[bytes]:
        """The next lines; on their way to the helper, where there is one."""
        lines = self.source.readlines(BATCH_BYTES)
        self.bytes_read += sum(map(len, lines))
        if self.helper is None and self.bytes_read > ALONE_BYTES:
            self.helper = Helper(self.drivername)
        if self.helper is not None and lines:
            self.helper.ask(lines)
        return lines
