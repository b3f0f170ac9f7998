"""Queries on ``generation_records``."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Select, bindparam, delete, select, update
from sqlalchemy.orm import Session

from models import FinishReason, GenerationRecord, HistoryQuery, Status


def add(session: Session, owner_id: str, **values: Any) -> GenerationRecord:
    """Insert a record, in progress unless ``values`` say otherwise; it has its id on return."""
    record = GenerationRecord(owner_id=owner_id, **({"status": Status.IN_PROGRESS} | values))
    session.add(record)
    session.flush()
    return record


def finish(session: Session, owner_id: str, record_id: int, **values: Any) -> bool:
    """Write a record's end, once: False when it is no longer in progress."""
    statement = (
        update(GenerationRecord)
        .where(
            GenerationRecord.id == record_id,
            GenerationRecord.owner_id == owner_id,
            GenerationRecord.status == Status.IN_PROGRESS,
        )
        .values(lease_id=None, cancel_requested=None, **values)
        .execution_options(synchronize_session=False)
    )
    return changed(session, statement) == 1


def checkpoint(session: Session, texts: Sequence[tuple[int, str, int]]) -> None:
    """Store how far running texts have come: (record id, text, tokens) of whatever owner."""
    statement = (
        update(GenerationRecord)
        .where(
            GenerationRecord.id == bindparam("record"),
            GenerationRecord.status == Status.IN_PROGRESS,
        )
        .values(completion=bindparam("text"), completion_tokens=bindparam("tokens"))
    )
    rows = [{"record": record, "text": text, "tokens": tokens} for record, text, tokens in texts]
    session.connection().execute(statement, rows)


def request_cancel(session: Session, owner_id: str, record_id: int) -> None:
    """Ask whichever process runs the record to cancel it."""
    session.execute(
        update(GenerationRecord)
        .where(
            GenerationRecord.id == record_id,
            GenerationRecord.owner_id == owner_id,
            GenerationRecord.status == Status.IN_PROGRESS,
        )
        .values(cancel_requested=True)
        .execution_options(synchronize_session=False)
    )


def to_cancel(session: Session, lease_id: int) -> list[int]:
    """Records of whatever owner that a process runs and somebody wants cancelled."""
    return list(
        session.scalars(
            select(GenerationRecord.id).where(
                GenerationRecord.lease_id == lease_id, GenerationRecord.cancel_requested.is_(True)
            )
        )
    )


def get(session: Session, owner_id: str, record_id: int) -> GenerationRecord | None:
    return session.scalar(
        select(GenerationRecord).where(
            GenerationRecord.id == record_id, GenerationRecord.owner_id == owner_id
        )
    )


def remove(session: Session, owner_id: str, record_id: int) -> bool:
    statement = delete(GenerationRecord).where(
        GenerationRecord.id == record_id, GenerationRecord.owner_id == owner_id
    )
    return changed(session, statement) == 1


def page(
    session: Session, owner_id: str, query: HistoryQuery
) -> tuple[list[GenerationRecord], bool]:
    """A page of records, newest first, and whether more follow."""
    statement = (
        filtered(select(GenerationRecord), query)
        .where(GenerationRecord.owner_id == owner_id)
        .order_by(GenerationRecord.id.desc())
        .limit(query.limit + 1)
    )
    found = list(session.scalars(statement))
    return found[: query.limit], len(found) > query.limit


def filtered(statement: Select[GenerationRecord], query: HistoryQuery) -> Select[GenerationRecord]:
    wanted = {
        GenerationRecord.user_id: query.user_id,
        GenerationRecord.status: query.status,
        GenerationRecord.model_name: query.model_name,
    }
    for column, value in wanted.items():
        if value is not None:
            statement = statement.where(column == value)
    if query.created_after is not None:
        statement = statement.where(GenerationRecord.created_at > query.created_after)
    if query.created_before is not None:
        statement = statement.where(GenerationRecord.created_at < query.created_before)
    if query.after is not None:
        statement = statement.where(GenerationRecord.id < query.after)
    return statement


def open_leases(session: Session) -> set[int]:
    """Leases that hold records of whatever owner in progress."""
    column = GenerationRecord.lease_id
    return {
        lease
        for lease in session.scalars(select(column).where(column.is_not(None)).distinct())
        if lease is not None
    }


def interrupt(session: Session, lease_ids: Sequence[int]) -> int:
    """Close what dead processes left in progress, of whatever owner; how many there were."""
    statement = (
        update(GenerationRecord)
        .where(
            GenerationRecord.lease_id.in_(lease_ids), GenerationRecord.status == Status.IN_PROGRESS
        )
        .values(status=Status.INCOMPLETE, finish_reason=FinishReason.INTERRUPTED, lease_id=None)
        .execution_options(synchronize_session=False)
    )
    return changed(session, statement)


def changed(session: Session, statement: Any) -> int:
    return int(session.execute(statement).rowcount)  # type: ignore[attr-defined]
