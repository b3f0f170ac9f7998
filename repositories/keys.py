"""Queries on the records that an ``Idempotency-Key`` stands for."""

from datetime import datetime

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from models import GenerationRecord


def find(session: Session, owner_id: str, key: str) -> GenerationRecord | None:
    return session.scalar(
        select(GenerationRecord).where(
            GenerationRecord.idempotency_key == key, GenerationRecord.owner_id == owner_id
        )
    )


def forget(session: Session, owner_id: str, key: str, before: datetime) -> None:
    """Free a key that has expired."""
    session.execute(
        update(GenerationRecord)
        .where(
            GenerationRecord.idempotency_key == key,
            GenerationRecord.owner_id == owner_id,
            GenerationRecord.created_at < before,
        )
        .values(idempotency_key=None)
        .execution_options(synchronize_session=False)
    )
