"""The events of a stream: ``start``, pieces of text, then ``done`` or an error, once it is stored.

A text event's id is the number of characters up to its end, so a follower that says how far it
came goes on from there: in the process that generates, in another one through the database, and
after the end or a crash.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

import anyio
import anyio.to_thread

from database import Database
from errors import NotFoundError, ServiceError
from models import TERMINAL, GenerationRecord
from repositories import records
from services.endings import outcome
from services.generation import Answer
from services.live import Live, LiveGenerations

POLL_SECONDS = 0.5
END_ID = "end"


@dataclass(frozen=True)
class Start:
    record_id: int
    id: str = "0"


@dataclass(frozen=True)
class Piece:
    text: str
    id: str


@dataclass(frozen=True)
class Done:
    record: GenerationRecord
    id: str = END_ID


@dataclass(frozen=True)
class Failed:
    error: ServiceError
    id: str = END_ID


Event = Start | Piece | Done | Failed


async def follow(live: Live, offset: int | None = None) -> AsyncGenerator[Event]:
    """The events of a generation in this process; from its beginning, or after ``offset``."""
    if offset is None:
        yield Start(live.record.id)
    place = offset or 0
    async with aclosing(live.follow(place)) as pieces:
        async for text in pieces:
            place += len(text)
            yield Piece(text, str(place))
    assert live.outcome is not None
    yield last_event(live.outcome)


def last_event(outcome: GenerationRecord | ServiceError) -> Event:
    return Failed(outcome) if isinstance(outcome, ServiceError) else Done(outcome)


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

    async def resume(self, record: GenerationRecord, offset: int | None) -> AsyncGenerator[Event]:
        live = self.live.get(record.owner_id, record.id)
        events = self.stored(record, offset) if live is None else follow(live, offset)
        async with aclosing(events) as following:
            async for event in following:
                yield event

    async def stored(self, record: GenerationRecord, offset: int | None) -> AsyncGenerator[Event]:
        """The events of a record as the database has it, read again until it has ended."""
        if offset is None:
            yield Start(record.id)
        place = offset or 0
        while True:
            if len(record.completion) > place:
                text, place = record.completion[place:], len(record.completion)
                yield Piece(text, str(place))
            if record.status in TERMINAL:
                yield last_event(outcome(record))
                return
            await anyio.sleep(POLL_SECONDS)
            try:
                record = await anyio.to_thread.run_sync(self.find, record.owner_id, record.id)
            except NotFoundError as error:
                yield Failed(error)
                return
