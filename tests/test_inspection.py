"""`manage check` is quiet about a sound database, and names what is wrong with another."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import text

import sqlite_file
from database import Database, transaction
from models import Status
from repositories import leases
from services import inspection
from services.leases import LeaseKeeper
from tests.test_history import insert
from tests.test_transfer import fill


def found(database: Database) -> list[str]:
    return [line for _, lines in inspection.problems(database) for line in lines]


def test_a_sound_database_has_no_problems(database: Database) -> None:
    keeper = LeaseKeeper(database)
    keeper.sweep()
    with database.sessions() as session:
        insert(session)
        insert(session, status=Status.IN_PROGRESS, lease_id=keeper.lease_id)
    assert found(database) == []


def test_records_of_the_dead_are_counted(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "BEAT_SECONDS", 0.01)
    keeper = LeaseKeeper(database)
    with database.sessions() as session:
        with transaction(session):
            dead = leases.add(session, keeper.machine, "1/1").id
            silent = leases.add(session, "another machine", "1/1").id
        for lease in (dead, silent, 4711):
            insert(session, status=Status.IN_PROGRESS, lease_id=lease)
    assert found(database) == ["3 records are held by no live process"]


def test_states_that_cannot_be_are_counted(database: Database) -> None:
    with database.sessions() as session:
        insert(session, status=Status.IN_PROGRESS, lease_id=None)
    assert found(database) == ["1 records are neither ended nor held by a process"]


def test_a_lost_index_is_named(database: Database) -> None:
    mysql = database.engine.dialect.name in ("mysql", "mariadb")
    with database.engine.begin() as connection:
        write = connection.execution_options(write=True)
        write.execute(text("DROP INDEX ix_records_status" + " ON generation_records" * mysql))
    assert found(database) == ["index ix_records_status is missing"]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_damage_and_lost_conversations_are_found(database: Database, tmp_path: Path) -> None:
    fill(database)
    assert database.file is not None
    with closing(sqlite3.connect(database.file)) as connection:
        sqlite_file.set_up(connection)
        connection.execute("PRAGMA foreign_keys=OFF")
        connection.execute("DELETE FROM conversations WHERE id = 2")
        connection.execute("UPDATE conversations SET owner_id = 'x' WHERE id = 3")
        connection.execute("UPDATE generation_records SET source_id = 4711 WHERE id = 5")
        connection.execute("PRAGMA writable_schema=ON")
        connection.execute(
            "UPDATE sqlite_master SET sql = replace(sql, ' status,', ' dtype,')"
            " WHERE name = 'ix_records_status'"
        )
        connection.execute("PRAGMA schema_version = 4711")
    lines = found(database)
    assert "2 records lack their conversation" in lines
    assert "1 answers from the cache lack their text" in lines
    assert any("ix_records_status" in line for line in lines)
