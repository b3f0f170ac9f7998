"""Values in columns: few bytes, and the same value again; also of rows that were there before."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from column_types import USUAL, shortened, whole
from database import Database
from models import Base, GenerationRecord, Status
from repositories import checks
from services import conversations, history
from tests.service import ROOT
from tests.test_history import OWNER, insert
from tests.test_search import ids_of, make_thread

ODD_PARAMETERS: list[dict[str, Any]] = [
    {},
    USUAL,
    USUAL | {"temperature": 1, "top_k": True, "stop": ["\n", "🐉:a"], "more": None},
    {"top_k": 50, "stop": []},
]
ODD_TIMES = [
    datetime(1969, 12, 31, 23, 59, 59, 999_999, UTC),
    datetime(1970, 1, 1, tzinfo=UTC),
    datetime(2026, 3, 29, 2, 30, 0, 1, UTC),
    datetime(9998, 12, 31, 23, 59, 59, 999_999, UTC),
]


@pytest.mark.parametrize("parameters", ODD_PARAMETERS)
def test_parameters_come_back_with_their_types(
    session: Session, parameters: dict[str, Any]
) -> None:
    record = insert(session, parameters=parameters)
    session.expire_all()
    found = session.get_one(GenerationRecord, record).parameters
    assert json.dumps(found, sort_keys=True) == json.dumps(parameters, sort_keys=True)


def test_the_usual_parameters_take_hardly_any_room() -> None:
    assert shortened(USUAL) == []
    assert shortened(USUAL | {"top_k": 3}) == [{"top_k": 3}]


def test_nobody_can_change_what_rows_are_read_by() -> None:
    """An answer here means rows that are there already: see the decision before changing it."""
    usual = {"max_new_tokens": 50, "temperature": 1.0, "top_k": 50, "top_p": 1.0}
    assert whole([]) == usual | {"repetition_penalty": 1.0, "stop": []}
    whole([])["stop"].append("x")
    assert whole([])["stop"] == []


def test_smaller_rows_go_down_and_up_again_as_they_were(
    database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with database.sessions() as session:
        thread, _ = make_thread(session, "Of unicorns")
        made = [
            insert(session, parameters=parameters, created_at=moment, conversation_id=thread)
            for parameters, moment in zip(ODD_PARAMETERS, ODD_TIMES, strict=True)
        ]
        hashes = {"cache_key": "00ff" * 8, "idempotency_fingerprint": "a" * 32}
        insert(
            session,
            source_id=made[0],
            prompt="",
            completion="",
            text_removed_at=ODD_TIMES[2],
            **hashes,
        )
        insert(session, status=Status.IN_PROGRESS, lease_id=7, flight_key="0" * 32)
        last = insert(session)
        history.delete(session, OWNER, last)
    before = everything(database)
    monkeypatch.setenv("DATABASE_URL", database_url)
    config = Config(ROOT / "alembic.ini")
    command.downgrade(config, "0006")
    columns = "created_at, parameters, cache_key, text_removed_at"
    statement = text(f"SELECT {columns} FROM generation_records ORDER BY id")
    with database.engine.connect() as connection:
        rows = connection.execute(statement).all()
    loads = (lambda value: value) if database.engine.dialect.name == "postgresql" else json.loads
    assert [loads(row.parameters) for row in rows[:4]] == ODD_PARAMETERS
    assert "00ff" * 8 in [row.cache_key for row in rows]
    if database.file is not None:
        texts = [moment.strftime("%Y-%m-%d %H:%M:%S.%f") for moment in ODD_TIMES]
        assert [row.created_at for row in rows[:4]] == texts
        assert rows[4].text_removed_at == texts[2]
    command.upgrade(config, "head")
    assert everything(database) == before
    with database.sessions() as session:
        assert ids_of(session, "once")[-len(made) :] == made[::-1]
        assert insert(session) > last
        conversations.delete(session, OWNER, thread)
        assert not set(ids_of(session, "once")) & set(made)
        assert checks.damage(session) == checks.missing_parts(session) == []


def everything(database: Database) -> Any:
    with database.engine.connect() as connection:
        return {
            table.name: connection.execute(select(table).order_by(table.c[0])).all()
            for table in Base.metadata.sorted_tables
        }


@pytest.mark.parametrize("database_url", ["mysql"], indirect=True)
def test_a_migration_that_was_cut_off_on_mysql_goes_on(
    database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There a change of a table is committed at once."""
    with database.sessions() as session:
        for parameters in ODD_PARAMETERS:
            insert(session, parameters=parameters, cache_key="00ff" * 8)
    before = everything(database)
    monkeypatch.setenv("DATABASE_URL", database_url)
    config = Config(ROOT / "alembic.ini")
    command.downgrade(config, "0006")
    with database.engine.begin() as connection:
        for done in (
            "ALTER TABLE generation_records MODIFY cache_key VARBINARY(32)",
            "UPDATE generation_records SET cache_key = UNHEX(cache_key) WHERE id < 3",
            "UPDATE generation_records SET parameters = '[]' WHERE id = 2",
        ):
            connection.execute(text(done))
    command.upgrade(config, "head")
    assert everything(database) == before
