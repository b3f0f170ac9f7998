"""Asked twice, done once: what an ``Idempotency-Key`` stands for.

The key is in the record's row, unique within its owner, so that the database decides which of two
requests was first, across processes and restarts.
"""

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pydantic import BaseModel
from sqlalchemy.orm import Session

from database import release, transaction
from errors import KeyInUseError, KeyReusedError
from models import FinishReason, GenerationRecord, Status
from repositories import keys
from services.conversations import NO_MODEL

CUT_SHORT = {FinishReason.INTERRUPTED, FinishReason.DISCONNECTED}


@dataclass(frozen=True)
class Once:
    """A key and what was asked with it: ``fingerprint`` is a hash of the route and the body."""

    key: str
    fingerprint: str


@dataclass(frozen=True)
class Key:
    """A client's key on a route."""

    value: str
    route: str

    def of(self, request: BaseModel) -> Once:
        asked = f"{self.route}\n{request.model_dump_json(exclude_unset=True)}"
        return Once(self.value, hashlib.sha256(asked.encode()).hexdigest()[:32])


def once_of(key: Key | None, request: BaseModel) -> Once | None:
    return None if key is None else key.of(request)


def once_values(once: Once | None) -> dict[str, str]:
    """What a record keeps of its key."""
    if once is None:
        return {}
    return {"idempotency_key": once.key, "idempotency_fingerprint": once.fingerprint}


def first_try(
    session: Session, owner_id: str, once: Once | None, lifetime: timedelta
) -> GenerationRecord | None:
    """What a key was used for within its lifetime.

    Raises KeyReusedError where that was something else, KeyInUseError while it still runs.
    """
    if once is None:
        return None
    record = keys.find(session, owner_id, once.key)
    release(session)
    if record is None:
        return None
    expired = datetime.now(UTC) - lifetime
    if record.created_at < expired:
        with transaction(session):
            keys.forget(session, owner_id, once.key, expired)
        return None
    if record.idempotency_fingerprint != once.fingerprint:
        raise KeyReusedError
    if record.status == Status.IN_PROGRESS:
        raise KeyInUseError(record_id=record.id)
    return record


def was_cut_short(record: GenerationRecord) -> bool:
    """Whether neither the model nor its client ended it: then it is run again on its own row.

    Not where somebody has changed the text by hand since: that would be lost.
    """
    return record.finish_reason in CUT_SHORT and record.model_fingerprint != NO_MODEL
