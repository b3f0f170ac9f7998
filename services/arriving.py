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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from multiprocessing.connection import Connection
from typing import Any, BinaryIO, NamedTuple, Self

from models import Conversation, GenerationRecord
from repositories.transfer import Loading, Ready
from services.lines import BrokenLineError, parse

BATCH_BYTES = 1 << 21  # some 2,000 records, a tenth of a second
ALONE_BYTES = 1 << 24  # a second process would not have started before so much is done

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


class Preparing:
    """Lines in, rows for one kind of database out."""

    def __init__(self, drivername: str) -> None:
        self.conversations = Loading(Conversation, drivername)
        self.records = Loading(GenerationRecord, drivername)

    def batch(self, lines: list[bytes]) -> Rows:
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

    def batch(self, lines: list[bytes]) -> Rows | None:
        """None while it starts, and when it is dead."""
        try:
            if not self.is_ready:
                if not self.pipe.poll():
                    return None
                self.is_ready = self.pipe.recv()
            self.pipe.send(lines)
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


@dataclass(frozen=True)
class Batch:
    """Lines that were read, and how many bytes they were."""

    rows: Rows
    size: int


class Arrivals:
    """The batches of a file or a stream; one is prepared while another is stored."""

    def __init__(self, source: BinaryIO, drivername: str) -> None:
        self.source = source
        self.drivername = drivername
        self.preparing = Preparing(drivername)
        self.reader = ThreadPoolExecutor(1)
        self.helper: Helper | None = None
        self.bytes_read = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.reader.shutdown()
        if self.helper is not None:
            self.helper.stop()

    def __iter__(self) -> Iterator[Batch]:
        coming = self.reader.submit(self.read)
        while (batch := coming.result()).rows:
            coming = self.reader.submit(self.read)
            yield batch

    def read(self) -> Batch:
        lines = self.source.readlines(BATCH_BYTES)
        size = sum(map(len, lines))
        self.bytes_read += size
        if self.helper is None and self.bytes_read > ALONE_BYTES:
            self.helper = Helper(self.drivername)
        rows = None if self.helper is None else self.helper.batch(lines)
        return Batch(self.preparing.batch(lines) if rows is None else rows, size)
