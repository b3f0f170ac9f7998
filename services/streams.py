"""The events of a stream: ``start``, pieces of text, then ``done`` or an error, once it is stored.

An event's id names the record and the number of characters up to the event's end, so a follower
that says how far it came goes on from there: in the process that generates, in another one through
the database, and after the end or a crash.
"""

import re
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Self

import anyio
import anyio.to_thread
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from database import Database
from errors import NotFoundError, ServiceError, StorageUnavailableError
from models import TERMINAL, GenerationRecord
from repositories import records
from services.endings import outcome
from services.generation import Answer
from services.live import Live, LiveGenerations

POLL_SECONDS = 0.5
LARGEST_ID = 2**63 - 1
PATIENCE_SECONDS = 10.0  # with a database that does not answer: a restart takes a few
PLACE = re.compile(r"([1-9][0-9]{0,18}):([0-9]{1,18}|end)", re.ASCII)


@dataclass(frozen=True)
class Place:
    """How much of a record's stream somebody has: characters of its text, or None for all of it
    and the last event."""

    record_id: int
    offset: int | None

    def __str__(self) -> str:
        return f"{self.record_id}:{'end' if self.offset is None else self.offset}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError."""
        if (found := PLACE.fullmatch(text)) is None:
            raise ValueError("not the id of an event")
        record_id, offset = found.groups()
        if int(record_id) > LARGEST_ID:
            raise ValueError("not the id of a record")
        return cls(int(record_id), None if offset == "end" else int(offset))


@dataclass(frozen=True)
class Start:
    place: Place


@dataclass(frozen=True)
class Piece:
    text: str
    place: Place


@dataclass(frozen=True)
class Done:
    record: GenerationRecord
    place: Place


@dataclass(frozen=True)
class Failed:
    error: ServiceError
    place: Place


Event = Start | Piece | Done | Failed


async def follow(live: Live, offset: int | None = None) -> AsyncGenerator[Event]:
    """The events of a generation in this process; from its beginning, or after ``offset``."""
    record_id = live.record.id
    seen = offset or 0
    with live.followed():  # from before the first event: who hangs up on that has left, too
        if offset is None:
            yield Start(Place(record_id, 0))
        async with aclosing(live.follow(seen)) as pieces:
            async for text in pieces:
                seen += len(text)
                yield Piece(text, Place(record_id, seen))
    assert live.outcome is not None
    yield last_event(record_id, live.outcome)


def last_event(record_id: int, outcome: GenerationRecord | ServiceError) -> Event:
    place = Place(record_id, None)
    return Failed(outcome, place) if isinstance(outcome, ServiceError) else Done(outcome, place)


class Streams:
    """Streams of records, wherever they run."""

    def __init__(self, database: Database, live: LiveGenerations) -> None:
        self.database = database
        self.live = live

    def find(self, owner_id: str, record_id: int) -> GenerationRecord:
        """Raises NotFoundError."""
        with self.database.sessions() as session:
            record = records.get(session, owner_id, record_id)
        if record is None:
            raise NotFoundError
        return record

    async def play(self, begun: Live | Answer) -> AsyncGenerator[Event]:
        """The events of what was just asked for, be it begun or answered before."""
        events = follow(begun) if isinstance(begun, Live) else self.stored(begun.record, None)
        async with aclosing(events) as following:
            async for event in following:
                yield event

    async def resume(self, record: GenerationRecord, place: Place | None) -> AsyncGenerator[Event]:
        """What follows ``place``; everything where it is None."""
        offset = None if place is None else place.offset
        live = self.live.get(record.owner_id, record.id)
        events = self.stored(record, offset) if live is None else follow(live, offset)
        async with aclosing(events) as following:
            async for event in following:
                yield event

    async def stored(self, record: GenerationRecord, offset: int | None) -> AsyncGenerator[Event]:
        """The events of a record as the database has it, read again until it has ended."""
        if offset is None:
            yield Start(Place(record.id, 0))
        seen = offset or 0
        while True:
            if len(record.completion) > seen:
                text, seen = record.completion[seen:], len(record.completion)
                yield Piece(text, Place(record.id, seen))
            if record.status in TERMINAL:
                yield last_event(record.id, outcome(record))
                return
            try:
                record = await self.read_again(record)
            except NotFoundError as error:
                yield Failed(error, Place(record.id, None))
                return
            except StorageUnavailableError as error:  # not the end: who comes back goes on there
                yield Failed(error, Place(record.id, seen))
                return

    async def read_again(self, record: GenerationRecord) -> GenerationRecord:
        """The record a moment later, or once the database answers again.

        Raises NotFoundError, StorageUnavailableError.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            await anyio.sleep(POLL_SECONDS)
            try:
                return await anyio.to_thread.run_sync(self.find, record.owner_id, record.id)
            except (DBAPIError, PoolTimeoutError):
                if time.monotonic() > deadline:
                    raise StorageUnavailableError(
                        "The database cannot be read at the moment.", record_id=record.id
                    ) from None
