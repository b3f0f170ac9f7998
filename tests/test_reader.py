"""Reads of one statement: on the event loop where that cannot wait, else in a thread."""

import asyncio
import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import URL, bindparam, func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from async_postgres import AsyncPostgres
from connections import READERS
from database import Database, transaction
from errors import StorageUnavailableError
from lookup import Lookup
from repositories import conversations, records
from services import history
from tests.test_history import NOON, OWNER, insert

COUNT = text("SELECT count(*) FROM conversations")
CHANGE = text("UPDATE conversations SET title = title")

SLEEP = Lookup(select(func.pg_sleep(bindparam("seconds"))))

on_servers = pytest.mark.parametrize("database_url", ["postgresql", "mysql"], indirect=True)
on_postgres = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)


@pytest.fixture
def in_file(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'records.db'}", timeout=30)
    database.open()
    yield database
    database.close()


def counted(session: Session) -> tuple[int, int]:
    return session.scalar(COUNT) or 0, threading.get_ident()


def test_only_a_file_is_read_on_the_event_loop(database: Database) -> None:
    found, thread = asyncio.run(database.reader.run(counted))
    assert found == 0
    assert (thread == threading.get_ident()) == (database.file is not None)


def test_a_read_finds_what_sqlalchemy_does(database: Database, session: Session) -> None:
    record = insert(session, prompt="Köln 🐈", parameters={"stop": ["x"]}, pinned=True)
    with transaction(session):
        conversation = conversations.add(
            session, OWNER, title="Köln 🐈", model_type="a", created_at=NOON, updated_at=NOON
        )

    async def read() -> tuple[list[object] | None, list[object] | None]:
        named = {"owner_id": OWNER}
        return (
            await database.reader.row(records.SHOWN, record_id=record, **named),
            await database.reader.row(
                conversations.SHOWN, conversation_id=conversation.id, **named
            ),
        )

    asked = {"owner_id": OWNER, "record_id": record, "conversation_id": conversation.id}
    expected = [
        list(session.execute(lookup.statement, asked).one())
        for lookup in (records.SHOWN, conversations.SHOWN)
    ]
    assert list(asyncio.run(read())) == expected


def test_each_read_sees_what_was_committed_before(database: Database, session: Session) -> None:
    async def read_all() -> None:
        for pinned in (False, True):
            record = insert(session, pinned=pinned)
            found = await history.read(database.reader, OWNER, record)
            assert found.pinned == pinned
            with transaction(session):
                records.pin(session, OWNER, record, not pinned, NOON)
            changed = {"pinned": not pinned, "updated_at": NOON}
            assert await history.read(database.reader, OWNER, record) == found.model_copy(
                update=changed
            )

    asyncio.run(read_all())


@on_servers
def test_a_read_outlives_the_connections_that_a_server_closed(
    database: Database, session: Session
) -> None:
    record = insert(session)
    reader = database.reader

    async def read_all() -> None:
        crowd = [history.read(reader, OWNER, record) for _ in range(2 * READERS)]
        before = await asyncio.gather(*crowd)
        end_connections(database)
        crowd = [history.read(reader, OWNER, record) for _ in range(2 * READERS)]
        assert await asyncio.gather(*crowd) == before

    asyncio.run(read_all())


def end_connections(database: Database) -> None:
    """All but the one that ends the others."""
    postgresql = database.engine.dialect.name == "postgresql"
    others, kill = (
        ("pid FROM pg_stat_activity WHERE datname = current_database()", "pg_terminate_backend")
        if postgresql
        else ("id FROM information_schema.processlist WHERE db = DATABASE()", "KILL")
    )
    with database.engine.connect() as killer:
        own = killer.scalar(text(f"SELECT {'pg_backend_pid' if postgresql else 'CONNECTION_ID'}()"))
        for number in killer.scalars(text(f"SELECT {others}")).all():
            if number != own:
                how = f"SELECT {kill}({number})" if postgresql else f"{kill} {number}"
                killer.execute(text(how))
    time.sleep(0.1)  # MariaDB ends them a little later


@on_servers
def test_who_finds_no_thread_in_time_is_told(database: Database) -> None:
    database.reader.timeout = 0.3

    def slow(_: Session) -> str:
        time.sleep(1)
        return "read"

    async def crowd() -> list[object]:
        reads = [database.reader.run(slow) for _ in range(READERS + 1)]
        return await asyncio.gather(*reads, return_exceptions=True)

    *served, late = asyncio.run(crowd())
    assert served == ["read"] * READERS
    assert isinstance(late, StorageUnavailableError)


async def asleep(database: Database, seconds: float) -> object:
    return await database.reader.row(SLEEP, seconds=seconds)


def waiting(database: Database, timeout: float) -> AsyncPostgres:
    """Where a PostgreSQL is read on the event loop, with other time-outs."""
    found = database.reader.postgres
    assert found is not None
    found.timeout = timeout
    return found


@on_postgres
def test_the_event_loop_goes_on_while_a_server_thinks(database: Database) -> None:
    async def count() -> int:
        counted = 0
        sleeper = asyncio.create_task(asleep(database, 1))
        while not sleeper.done():
            await asyncio.sleep(0.01)
            counted += 1
        return counted

    threads = threading.active_count()
    assert asyncio.run(count()) > 5
    assert threading.active_count() == threads


@on_postgres
def test_who_finds_no_connection_in_time_is_told(database: Database) -> None:
    waiting(database, 0.3)

    async def crowd() -> list[object]:
        reads = [asleep(database, 0.8) for _ in range(READERS + 1)]
        return await asyncio.gather(*reads, return_exceptions=True)

    *served, late = asyncio.run(crowd())
    assert all(isinstance(row, list) for row in served)
    assert isinstance(late, StorageUnavailableError)


@on_postgres
def test_a_read_that_takes_too_long_is_ended_and_harms_no_other(
    database: Database, session: Session
) -> None:
    record = insert(session)
    postgres = waiting(database, 0.4)

    async def read() -> None:
        with pytest.raises(DBAPIError):
            await asleep(database, 10)
        (connection,) = postgres.free
        await history.read(database.reader, OWNER, record)
        assert postgres.free == [connection]

    asyncio.run(read())


class Hole:
    """Between a client and a server, until it swallows what the server says after so many bytes."""

    def __init__(self, url: URL) -> None:
        self.server = url.host, url.port
        self.left = 1 << 30
        self.writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> int:
        self.listening = await asyncio.start_server(self.between, "127.0.0.1", 0)
        port: int = self.listening.sockets[0].getsockname()[1]
        return port

    async def __aexit__(self, *_: object) -> None:
        self.listening.close()
        for writer in self.writers:
            writer.close()

    async def between(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection(*self.server)
        self.writers += [writer, to_server]
        await asyncio.gather(self.pass_on(reader, to_server), self.pass_back(from_server, writer))

    async def pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while said := await reader.read(1 << 16):
            writer.write(said)

    async def pass_back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while said := await reader.read(1 << 16):
            if self.left > 0:
                writer.write(said)
            self.left -= len(said)


@on_postgres
@pytest.mark.parametrize("said", [0, 1])
def test_a_server_that_falls_silent_is_given_up(
    database: Database, session: Session, said: int
) -> None:
    """In the middle of an answer, or after it let the client in."""
    record = insert(session)

    async def read() -> None:
        hole = Hole(database.url)
        async with hole as port:
            url = database.url.set(host="127.0.0.1", port=port)
            postgres = AsyncPostgres(url, 0.2)

            async def ask() -> object:
                return await postgres.row(records.SHOWN, {"owner_id": OWNER, "record_id": record})

            if not said:
                assert await ask()
            hole.left = said  # the first that it says to who comes is that it lets him in
            began = time.monotonic()
            with pytest.raises(DBAPIError):
                await ask()
            assert 1 < time.monotonic() - began < 10  # psycopg by itself: 11.4
            assert not postgres.free
            hole.left = 1 << 30
            assert await ask()
            postgres.close()

    asyncio.run(read())


@on_postgres
def test_a_request_that_goes_away_takes_its_connection_along(
    database: Database, session: Session
) -> None:
    record = insert(session)
    postgres = waiting(database, 5)

    async def read() -> None:
        sleeper = asyncio.create_task(asleep(database, 1))
        await asyncio.sleep(0.2)
        sleeper.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sleeper
        assert postgres.free == []
        found = [history.read(database.reader, OWNER, record) for _ in range(2 * READERS)]
        assert {one.id for one in await asyncio.gather(*found)} == {record}

    asyncio.run(read())


def test_what_would_wait_for_a_lock_waits_in_a_thread(in_file: Database) -> None:
    threads: list[int] = []
    patience: list[int] = []

    def change(session: Session) -> None:
        if not session.in_transaction():
            session.connection(execution_options={"write": True})
        threads.append(threading.get_ident())
        patience.append(session.scalar(text("PRAGMA busy_timeout")) or 0)
        session.execute(CHANGE)

    async def run(writer: sqlite3.Connection) -> None:
        writer.execute("BEGIN IMMEDIATE")
        asyncio.get_running_loop().call_later(0.05, writer.rollback)  # a blocked loop never would
        await in_file.reader.run(change)

    with contextlib.closing(sqlite3.connect(str(in_file.file))) as writer:
        asyncio.run(run(writer))
    here, there = threads
    assert here == threading.get_ident() != there
    assert patience == [0, 30_000]


def test_each_read_sees_what_was_committed_before_and_holds_nothing(in_file: Database) -> None:
    def read() -> int:
        return asyncio.run(in_file.reader.run(counted))[0]

    assert read() == 0
    with contextlib.closing(sqlite3.connect(str(in_file.file))) as writer:
        writer.execute(
            "INSERT INTO conversations (owner_id, title, model_type, created_at, updated_at)"
            " VALUES ('local', 'A title', 'model', '2026-01-01', '2026-01-01')"
        )
        writer.commit()
        assert read() == 1
    assert in_file.truncate_log()
