"""Reads of one statement: on the event loop where that cannot wait, else in a thread."""

import asyncio
import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from connections import READERS
from database import Database
from errors import StorageUnavailableError
from repositories import records
from tests.test_history import OWNER, insert

COUNT = text("SELECT count(*) FROM conversations")
CHANGE = text("UPDATE conversations SET title = title")

on_servers = pytest.mark.parametrize("database_url", ["postgresql", "mysql"], indirect=True)


@pytest.fixture
def opened(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    database.open()
    yield database
    database.close()


@pytest.fixture
def in_file(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'records.db'}", timeout=30)
    database.open()
    yield database
    database.close()


def counted(session: Session) -> tuple[int, int]:
    return session.scalar(COUNT) or 0, threading.get_ident()


def test_only_a_file_is_read_on_the_event_loop(opened: Database) -> None:
    found, thread = asyncio.run(opened.reader.run(counted))
    assert found == 0
    assert (thread == threading.get_ident()) == (opened.file is not None)


@on_servers
def test_a_read_outlives_the_connections_that_a_server_closed(opened: Database) -> None:
    with opened.sessions() as session:
        record = insert(session)

    def read() -> object:
        return asyncio.run(opened.reader.run(records.shown, OWNER, record))

    before = read()
    postgresql = opened.engine.dialect.name == "postgresql"
    others, kill = (
        ("pid FROM pg_stat_activity WHERE datname = current_database()", "pg_terminate_backend")
        if postgresql
        else ("id FROM information_schema.processlist WHERE db = DATABASE()", "KILL")
    )
    with opened.engine.connect() as killer:
        own = killer.scalar(text(f"SELECT {'pg_backend_pid' if postgresql else 'CONNECTION_ID'}()"))
        for number in killer.scalars(text(f"SELECT {others}")).all():
            if number != own:
                how = f"SELECT {kill}({number})" if postgresql else f"{kill} {number}"
                killer.execute(text(how))
    time.sleep(0.1)  # MariaDB ends them a little later
    assert before is not None
    assert read() == before


@on_servers
def test_who_finds_no_thread_in_time_is_told(opened: Database) -> None:
    opened.reader.timeout = 0.1

    def slow(_: Session) -> str:
        time.sleep(0.5)
        return "read"

    async def crowd() -> list[object]:
        reads = [opened.reader.run(slow) for _ in range(READERS + 1)]
        return await asyncio.gather(*reads, return_exceptions=True)

    *served, late = asyncio.run(crowd())
    assert served == ["read"] * READERS
    assert isinstance(late, StorageUnavailableError)


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
