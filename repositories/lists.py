"""Pages of records: the newest, or those that a search finds."""

from collections.abc import Iterator
from typing import Any, TypeVar

from sqlalchemy import Select, text
from sqlalchemy.orm import Session

from models import HistoryItem, HistoryQuery, Status
from repositories import blocks, records, search
from words import parse_search, record_marks

MOST_HITS = 1000  # of a search, looked at together
RECORD = records.TABLE.c


Statement = TypeVar("Statement", bound=Select[Any])


def page(session: Session, owner_id: str, query: HistoryQuery) -> tuple[list[HistoryItem], bool]:
    """A page of records, newest first or those that a search finds, and whether more follow."""
    count, found = query.limit + 1, list[HistoryItem]()
    look = newest if query.q is None else matches
    for above, below in blocks.id_ranges(session, owner_id, query):
        found += look(session, owner_id, query, count - len(found), above, below)
        if len(found) == count:
            break
    return found[: query.limit], len(found) == count


def newest(
    session: Session, owner_id: str, query: HistoryQuery, count: int, above: int, below: int | None
) -> list[HistoryItem]:
    """The newest records between two ids, at most ``count``."""
    statement = filtered(records.VIEW, query).where(RECORD.owner_id == owner_id, RECORD.id >= above)
    if below is not None:
        statement = statement.where(RECORD.id < below)
    return list(as_answered(session, statement.limit(count)))


def matches(
    session: Session, owner_id: str, query: HistoryQuery, count: int, above: int, below: int | None
) -> list[HistoryItem]:
    """The newest records between two ids with the words that a query asks for."""
    marks = record_marks(owner_id, query.user_id, query.status, query.model_name)
    asked = parse_search(query.q or ""), marks
    found: list[HistoryItem] = []
    batch = count
    while len(found) < count:
        ids = search.hits(session, search.RECORDS, asked, batch, below, above - 1)
        statement = filtered(records.VIEW, query).where(
            RECORD.owner_id == owner_id, RECORD.id.in_(ids)
        )
        found += as_answered(session, statement)
        if len(ids) < batch:
            break
        below, batch = ids[-1], min(2 * batch, MOST_HITS)
    return found[:count]


def as_answered(session: Session, statement: Select[Any]) -> Iterator[HistoryItem]:
    """What a statement on ``VIEW`` finds, newest first."""
    rows = session.execute(statement.order_by(RECORD.id.desc()))
    return (records.as_answered(row, HistoryItem) for row in rows)


def filtered(statement: Statement, query: HistoryQuery) -> Statement:
    wanted = {
        RECORD.user_id: query.user_id,
        RECORD.status: query.status,
        RECORD.model_name: query.model_name,
    }
    for column, value in wanted.items():
        if value is not None:
            statement = statement.where(column == value)
    if query.status not in (None, Status.COMPLETED):  # the index of those says so, word for word
        statement = statement.where(text("generation_records.status <> 'completed'"))
    if query.created_after is not None:
        statement = statement.where(RECORD.created_at > query.created_after)
    if query.created_before is not None:
        statement = statement.where(RECORD.created_at < query.created_before)
    if query.after is not None:
        statement = statement.where(RECORD.id < query.after)
    return statement
