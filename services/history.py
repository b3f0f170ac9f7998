"""Reading and deleting what was kept."""

import logging
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from sqlalchemy.orm import Session

from database import release, transaction
from engine.sampling import FinishReason
from errors import ConflictError, NotFoundError
from log import event
from models import TERMINAL, GenerationRecord, HistoryItem, HistoryQuery, Record
from reader import Reader
from repositories import lists, records, removal
from services import search
from services.live import Live, LiveGenerations

log = logging.getLogger(__name__)

CANCEL_PATIENCE_SECONDS = 3.0


def get(session: Session, owner_id: str, record_id: int) -> GenerationRecord:
    """Raises NotFoundError, also for somebody else's record."""
    record = records.get(session, owner_id, record_id)
    if record is None:
        raise NotFoundError
    return record


async def read(reader: Reader, owner_id: str, record_id: int) -> Record:
    """A record as it is answered, in one statement. Raises NotFoundError, as ``get``."""
    row = await reader.row(records.SHOWN, owner_id=owner_id, record_id=record_id)
    if row is None:
        raise NotFoundError
    return records.as_answered(row, Record)


def find(session: Session, owner_id: str | None, record_id: int) -> GenerationRecord:
    """For an operator: of whatever owner where none is named. Raises NotFoundError."""
    record = records.find(session, owner_id, record_id)
    if record is None:
        raise NotFoundError
    return record


def page(session: Session, owner_id: str, query: HistoryQuery) -> tuple[list[HistoryItem], bool]:
    """A page, newest or best matches first, and whether more follow. Raises InvalidRequestError."""
    if query.order == "rank":
        return search.ranked_page(session, owner_id, query)
    return lists.page(session, owner_id, query)


def cancel(
    session: Session, owner_id: str, record_id: int, live: LiveGenerations
) -> GenerationRecord:
    """Stop a generation in whichever process it runs, and wait a little for its end.

    The record may still be in progress when that process has not heard of it yet. Raises
    NotFoundError, and ConflictError when it had ended before.
    """
    if get(session, owner_id, record_id).status in TERMINAL:
        raise ConflictError("The generation has already ended.", record_id=record_id)
    release(session)
    if (running := live.get(owner_id, record_id)) is not None:
        running.generation.cancel(FinishReason.CANCELLED)
    else:
        with transaction(session):
            records.request_cancel(session, owner_id, record_id)
    deadline = time.monotonic() + CANCEL_PATIENCE_SECONDS
    while True:
        session.expire_all()
        record = get(session, owner_id, record_id)
        release(session)
        if record.status in TERMINAL or time.monotonic() > deadline:
            return record
        time.sleep(0.05)


def pin(session: Session, owner_id: str, record_id: int, pinned: bool) -> GenerationRecord:
    """Keep a record however old it is, or no longer. Raises NotFoundError."""
    with transaction(session):
        records.pin(session, owner_id, record_id, pinned, datetime.now(UTC))
        return get(session, owner_id, record_id)


def delete(session: Session, owner_id: str, record_id: int, running: Sequence[Live] = ()) -> None:
    """Stop it, too, where it is among those that run here. Raises NotFoundError."""
    with transaction(session):
        if not removal.remove(session, owner_id, record_id):
            raise NotFoundError
    stop(running, lambda record: record.id == record_id)
    event(log, logging.INFO, "record deleted", id=record_id)


def stop(running: Sequence[Live], is_deleted: Callable[[GenerationRecord], bool]) -> None:
    """At once what runs here; another process finds with its next checkpoint that a row is gone."""
    for live in running:
        if is_deleted(live.record):
            live.generation.cancel(FinishReason.CANCELLED)
