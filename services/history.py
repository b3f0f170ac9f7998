"""Reading and deleting what was kept."""

import logging

from sqlalchemy.orm import Session

from database import transaction
from errors import NotFoundError
from log import event
from models import GenerationRecord, HistoryQuery
from repositories import records

log = logging.getLogger(__name__)


def get(session: Session, owner_id: str, record_id: int) -> GenerationRecord:
    """Raises NotFoundError, also for somebody else's record."""
    record = records.get(session, owner_id, record_id)
    if record is None:
        raise NotFoundError
    return record


def page(
    session: Session, owner_id: str, query: HistoryQuery
) -> tuple[list[GenerationRecord], bool]:
    """A page, newest first, and whether more follow."""
    return records.page(session, owner_id, query)


def delete(session: Session, owner_id: str, record_id: int) -> None:
    """Raises NotFoundError."""
    with transaction(session):
        if not records.remove(session, owner_id, record_id):
            raise NotFoundError
    event(log, logging.INFO, "record deleted", id=record_id)
