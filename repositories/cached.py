"""Queries on records that show the text of another, and on those whose text they may show."""

from datetime import datetime
from typing import Any

from sqlalchemy import bindparam, insert, select
from sqlalchemy.orm import Session
from sqlalchemy.orm.attributes import set_committed_value

from lookup import Lookup
from models import GenerationRecord, Status
from repositories import blocks
from repositories.records import TABLE, keep_account

COPIED = (
    "finish_reason",
    "model_name",
    "model_fingerprint",
    "dtype",
    "parameters",
    "seed",
    "prompt_tokens",
    "completion_tokens",
)
TEXTLESS = {
    "status": Status.COMPLETED,
    "prompt": "",
    "completion": "",
    "user_id": None,
    "duration_ms": None,
    "attempts": 1,
    "pinned": False,
}
INSERT = insert(GenerationRecord)
BY_CACHE_KEY = Lookup(
    select(TABLE)
    .where(
        TABLE.c.cache_key == bindparam("cache_key"),
        TABLE.c.owner_id == bindparam("owner_id"),
        TABLE.c.status == Status.COMPLETED,
        TABLE.c.created_at > bindparam("since"),
    )
    .order_by(TABLE.c.id.desc())
    .limit(1)
)
HELD_SOURCE = Lookup(
    select(TABLE.c.id)
    .where(
        TABLE.c.id == bindparam("record_id"),
        TABLE.c.owner_id == bindparam("owner_id"),
        TABLE.c.cache_key == bindparam("cache_key"),
    )
    .with_for_update(read=True)
)


def add(
    session: Session, owner_id: str, source: GenerationRecord, **values: Any
) -> GenerationRecord:
    """Insert a complete answer that shows the text of another record and holds none.

    What is returned belongs to no session: to insert an object and to read it back for the
    account takes seven times as long as to insert its row.
    """
    row = TEXTLESS | {name: getattr(source, name) for name in COPIED} | values
    row |= {"owner_id": owner_id, "source_id": source.id}
    key: Any = session.connection().execute(INSERT, row).inserted_primary_key
    row["id"] = key.id
    blocks.note(session, [blocks.Place.of(row)])
    keep_account(session, [row])
    record = GenerationRecord(**row)
    set_committed_value(record, "source", source)
    return record


def find(
    session: Session, owner_id: str, cache_key: str, since: datetime
) -> GenerationRecord | None:
    """The latest complete answer to the same work. It has a text of its own; no session has it."""
    row = BY_CACHE_KEY.row(session, cache_key=cache_key, owner_id=owner_id, since=since)
    return None if row is None else GenerationRecord(**dict(zip(TABLE.c.keys(), row, strict=True)))


def hold(session: Session, owner_id: str, record_id: int, cache_key: str) -> bool:
    """Whether a record's text is still the answer to this work: then, to the transaction's end."""
    found = HELD_SOURCE.row(session, record_id=record_id, owner_id=owner_id, cache_key=cache_key)
    return found is not None


def in_flight(session: Session, owner_id: str, flight_key: str) -> int | None:
    """The record whose generation does the same work now."""
    return session.scalar(
        select(GenerationRecord.id).where(
            GenerationRecord.flight_key == flight_key, GenerationRecord.owner_id == owner_id
        )
    )
