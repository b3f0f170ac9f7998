"""`manage check` is quiet about a sound database, and names what is wrong with another."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import text

import sqlite_file
from database import Database, transaction
from models import Status
from repositories import checks, leases, removal
from services import inspection
from services.leases import LeaseKeeper
from tests.test_history import NOON, insert
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


def plant(database: Database, *statements: str) -> None:
    with database.engine.begin() as connection:
        for statement in statements:
            connection.execution_options(write=True).execute(text(statement))


def is_mysql(database: Database) -> bool:
    return database.engine.dialect.name in ("mysql", "mariadb")


def test_a_lost_index_is_named(database: Database) -> None:
    plant(database, "DROP INDEX ix_records_status" + " ON generation_records" * is_mysql(database))
    assert found(database) == ["index ix_records_status is missing"]


def test_an_index_that_lets_everything_in_is_named(database: Database) -> None:
    plant(
        database,
        "DROP INDEX ix_records_flight" + " ON generation_records" * is_mysql(database),
        "CREATE INDEX ix_records_flight ON generation_records (flight_key)",
    )
    assert found(database) == ["index ix_records_flight lets the same value in twice"]


def test_a_lost_table_is_named_and_the_rest_is_looked_at(database: Database) -> None:
    with database.sessions() as session:
        insert(session, status=Status.IN_PROGRESS, lease_id=None)
    plant(database, "DROP TABLE usage_sums", "DROP TABLE title_search")
    lines = found(database)
    assert {"table title_search is missing", "table usage_sums is missing"} <= {*lines}
    assert "1 records are neither ended nor held by a process" in lines


def test_a_lost_place_in_the_queue_of_who_adds_up_is_found(database: Database) -> None:
    plant(database, "DELETE FROM usage_sums")
    assert found(database) == ["the row is missing that is held to add to them"]


@pytest.mark.parametrize(
    "loss", ["DELETE FROM record_blocks", "UPDATE record_blocks SET latest = earliest"]
)
def test_records_that_no_time_leads_to_are_counted(database: Database, loss: str) -> None:
    with database.sessions() as session:
        for _ in range(2):
            insert(session)
    plant(database, loss)
    assert found(database) == ["2 records are not found by their times"]


def test_records_that_no_model_leads_to_are_counted(database: Database) -> None:
    with database.sessions() as session:
        for model_name in ("gpt2", "gpt2", "tiny-gpt2"):
            insert(session, model_name=model_name)
    plant(database, "DELETE FROM model_blocks WHERE model_name = 'gpt2'")
    assert found(database) == ["2 records are not found by their models"]


def test_what_no_search_finds_is_counted(database: Database) -> None:
    fill(database)  # of its records, one is in progress
    for index in ("record_search", "title_search"):
        emptied = f"INSERT INTO {index} ({index}) VALUES ('delete-all')"
        plant(database, emptied if database.file is not None else f"DELETE FROM {index}")
    with database.sessions() as session:
        gone = insert(session)
        with transaction(session):
            removal.remove_texts(session, [gone], NOON)
    lines = found(database)
    assert "3 records are not found by a search" in lines
    assert "3 conversations are not found by a search" in lines


only_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@only_sqlite
@pytest.mark.parametrize("trigger", ["record_search_deleted", "title_search_changed"])
def test_a_lost_trigger_is_named(database: Database, trigger: str) -> None:
    plant(database, f"DROP TRIGGER {trigger}")
    assert found(database) == [f"trigger {trigger} is missing"]


@only_sqlite
@pytest.mark.parametrize("index", ["record_search", "title_search"])
def test_a_damaged_search_index_is_named(
    database: Database, index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(database)
    plant(database, f"UPDATE {index}_data SET block = randomblob(length(block)) WHERE id > 10")
    with monkeypatch.context() as patch:
        patch.setattr(inspection, "QUICK_RECORDS", 0)  # a large one holds writers up too long
        assert f"{index} is damaged" not in found(database)
    assert f"{index} is damaged" in found(database)


@only_sqlite
def test_a_damaged_search_index_of_any_size_is_named_when_asked_for_the_whole(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(database)
    monkeypatch.setattr(inspection, "QUICK_RECORDS", 0)
    plant(database, "UPDATE record_search_data SET block = randomblob(20) WHERE id > 10")
    whole = dict(inspection.problems(database, whole=True))
    assert whole[inspection.SEARCH_CHECK] == ["record_search is damaged"]


@only_sqlite
@pytest.mark.parametrize(
    "damage",
    [
        "prompt = CAST(X'ff63616e617279ff' AS TEXT)",
        "parameters = '{\"canary\"'",
        "parameters = '\"canary\"'",
        "created_at = '2026-01-01 canary'",
        "updated_at = 9223372036854775807",
    ],
)
def test_a_row_that_cannot_be_read_is_named_without_its_text(
    database: Database, damage: str
) -> None:
    assert database.file is not None
    with database.sessions() as session:
        rows = [insert(session) for _ in range(3)]
    with closing(sqlite3.connect(database.file)) as connection, connection:
        sqlite_file.set_up(connection)
        connection.execute("DROP TRIGGER record_search_changed")
        connection.execute(f"UPDATE generation_records SET {damage} WHERE id = {rows[1]}")
    lines = found(database)
    assert f"row {rows[1]} of generation_records cannot be read" in lines
    assert len([line for line in lines if line.startswith("row")]) == 1
    assert "canary" not in str(lines)


@only_sqlite
def test_of_many_rows_that_cannot_be_read_some_are_named(database: Database) -> None:
    with database.sessions() as session:
        for _ in range(checks.READ_AT_ONCE + 5):
            insert(session)
    plant(database, "UPDATE generation_records SET parameters = '{' WHERE id > 90")
    lines = [line for line in found(database) if line.startswith("row")]
    assert len(lines) == checks.MOST_NAMED
    assert lines[0] == "row 91 of generation_records cannot be read"


@only_sqlite
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
