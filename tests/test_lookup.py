"""Queries of one row: what SQLAlchemy would read, and its errors."""

from collections.abc import Iterator

import pytest
from sqlalchemy import bindparam, event, literal_column, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, sessionmaker

from database import Database, transaction
from lookup import Lookup
from models import Conversation, GenerationRecord, Status
from repositories import conversations
from tests.test_history import OWNER, insert


@pytest.fixture
def reading(database: Database) -> Iterator[tuple[Session, Session]]:
    """A session, and one as single statements are read in."""
    engine = database.reader.engine
    assert engine is not None
    with database.sessions() as session, sessionmaker(engine)() as reader:
        yield session, reader


def watched(session: Session) -> list[object]:
    """What SQLAlchemy runs from now on."""
    seen: list[object] = []
    event.listen(session.get_bind(), "before_cursor_execute", lambda *told: seen.append(told))
    return seen


@pytest.mark.parametrize("table", [GenerationRecord, Conversation])
def test_a_lookup_finds_what_sqlalchemy_does(
    reading: tuple[Session, Session], table: type[GenerationRecord] | type[Conversation]
) -> None:
    session, reader = reading
    record = insert(session, prompt="Köln 🐈", parameters={"stop": ["x"]}, pinned=True)
    with transaction(session):
        made = conversations.add(
            session,
            OWNER,
            title="Köln 🐈",
            title_pending=True,
            model_type="tiny-gpt2",
            created_at=session.get_one(GenerationRecord, record).created_at,
            updated_at=session.get_one(GenerationRecord, record).updated_at,
        )
    found = record if table is GenerationRecord else made.id
    every = select(table.__table__).where(table.id == bindparam("found"))
    lookup = Lookup(every)
    for source in (session, reader):
        expected = source.execute(every, {"found": found}).one()
        through_sqlalchemy = watched(source)
        assert lookup.row(source, found=found) == list(expected)
        assert lookup.row(source, found=found + 1) is None
        assert not through_sqlalchemy


def test_what_is_asked_for_is_written_as_the_column_keeps_it(
    reading: tuple[Session, Session],
) -> None:
    session, reader = reading
    record = insert(session, cache_key="0123456789abcdef" * 2)
    created = session.get_one(GenerationRecord, record).created_at
    columns = GenerationRecord.__table__.c
    lookup = Lookup(
        select(columns.id)
        .where(
            columns.cache_key == bindparam("key"),
            columns.created_at == bindparam("created"),
            columns.status == Status.COMPLETED,
        )
        .limit(1)
    )
    for source in (session, reader):
        assert lookup.row(source, key="0123456789abcdef" * 2, created=created) == [record]
        assert lookup.row(source, key="0" * 32, created=created) is None


def test_what_goes_wrong_is_told_as_everywhere(reading: tuple[Session, Session]) -> None:
    nonsense = Lookup(
        select(literal_column("nonsense")).where(literal_column("1") == bindparam("one"))
    )
    with pytest.raises(DBAPIError):
        nonsense.row(reading[1], one=1)
