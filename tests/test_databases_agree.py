"""What databases do differently by themselves, and must not do here."""

from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from sqlalchemy import make_url, select
from sqlalchemy.orm import Session

from database import Database, transaction
from models import GenerationRecord
from repositories import keys, removal
from tests import databases
from tests.databases import KINDS
from tests.prepared import prepared_database
from tests.test_history import OWNER, ids, insert

ALIKE = ["straße", "STRASSE", "Straße", "straße ", "straße\u200b", "stra\u00dfe\u0301", "🐉", "🐲"]


def test_texts_that_look_alike_are_different(session: Session) -> None:
    made = {name: insert(session, user_id=name) for name in ALIKE}
    assert {name: ids(session, user_id=name) for name in ALIKE} == {
        name: [record] for name, record in made.items()
    }


def test_composed_and_decomposed_letters_are_different(session: Session) -> None:
    composed, decomposed = insert(session, user_id="\u00e9"), insert(session, user_id="e\u0301")
    assert ids(session, user_id="\u00e9") == [composed]
    assert ids(session, user_id="e\u0301") == [decomposed]


def test_unique_texts_are_compared_byte_by_byte(session: Session) -> None:
    for key in ("key", "KEY", "key "):
        insert(session, idempotency_key=key)
    for key in ("key", "KEY", "key "):
        found = keys.find(session, OWNER, key)
        assert found is not None
        assert found.idempotency_key == key


def test_owners_that_look_alike_see_nothing_of_each_other(session: Session) -> None:
    insert(session, owner="anna")
    for other in ("Anna", "anna ", "ANNA", "änna"):
        assert ids(session, owner=other) == []


@pytest.mark.parametrize("length", [65_535, 65_536, 1_000_000])
def test_long_texts_are_kept_whole(session: Session, length: int) -> None:
    text = "🐉" * (length // 4) + "x" * (length % 4)
    record = insert(session, prompt="p", completion=text)
    session.expire_all()
    assert session.get_one(GenerationRecord, record).completion == text


@pytest.fixture(params=KINDS)
def tokyo(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A database whose sessions live in another time zone."""
    with prepared_database(request.param, tmp_path) as url:
        query = {
            "sqlite": {},
            "postgresql": {"options": "-ctimezone=Asia/Tokyo"},
            "mysql": {"init_command": "SET time_zone = '+09:00'"},
        }[request.param]
        moved = make_url(url).update_query_dict(query).render_as_string(hide_password=False)
        database = Database(moved)
        database.migrate()
        yield database
        database.close()


@pytest.mark.parametrize("offset", [-11, 0, 5.5, 14])
def test_moments_are_the_same_in_every_time_zone(tokyo: Database, offset: float) -> None:
    here = timezone(timedelta(hours=offset))
    moment = datetime(2026, 3, 29, 2, 30, 0, 999_999, here)
    with tokyo.sessions() as session:
        record = insert(session, created_at=moment)
        session.expire_all()
        found = session.get_one(GenerationRecord, record).created_at
        assert (found, found.utcoffset()) == (moment, timedelta(0))
        assert ids(session, created_after=moment - timedelta(microseconds=1)) == [record]
        assert ids(session, created_after=moment) == []


def test_ids_are_not_used_again_after_everything_was_deleted(database: Database) -> None:
    with database.sessions() as session:
        last = [insert(session) for _ in range(3)][-1]
        with transaction(session):
            for record in session.scalars(select(GenerationRecord)):
                removal.remove(session, OWNER, record.id)
        database.engine.dispose()
        assert insert(session) > last


def test_parameters_come_back_as_they_were(session: Session) -> None:
    parameters = {"stop": ["\n", "🐉", "\\"], "seed": 2**63 - 1, "top_p": 0.1, "none": None}
    record = insert(session, parameters=parameters)
    session.expire_all()
    assert session.get_one(GenerationRecord, record).parameters == parameters


def test_a_server_that_is_missing_fails_where_it_must_be_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in databases.VARIABLES.values():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("NO_SKIPS", raising=False)
    with pytest.raises(pytest.skip.Exception):
        databases.server_url("postgresql")
    monkeypatch.setenv("NO_SKIPS", "1")
    with pytest.raises(pytest.fail.Exception):
        databases.server_url("postgresql")
