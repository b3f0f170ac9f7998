"""Stores how generations ended: first the row, then the answer."""

import logging
import time
from collections import deque
from datetime import UTC, datetime
from typing import Any

from sqlalchemy.orm import Session

import metrics
from database import Database, transaction
from errors import ConflictError, StorageUnavailableError
from log import event
from models import GenerationRecord, Status
from repositories import records
from repositories.records import RecordEnd
from services.crowds import Crowds, SpoiltError
from services.endings import Ending
from services.leases import LeaseKeeper

log = logging.getLogger(__name__)

FINISH_ATTEMPTS = 3
FINISH_PAUSE_SECONDS = 0.5  # more after each: a server that was restarted is back by then


class Finisher:
    """Commits endings, and keeps those that the database refused until it takes them."""

    def __init__(self, database: Database, crowds: Crowds, lease: LeaseKeeper) -> None:
        self.database = database
        self.crowds = crowds
        self.lease = lease
        self.unstored: deque[tuple[GenerationRecord, dict[str, Any]]] = deque()

    def finish(
        self, session: Session, record: GenerationRecord, ending: Ending, seconds: float
    ) -> GenerationRecord:
        """Commit the end. Only what is stored is answered."""
        values: dict[str, Any] = {
            "status": ending.status,
            "finish_reason": ending.finish_reason,
            "completion": ending.completion,
            "completion_tokens": ending.completion_tokens,
            "duration_ms": round(seconds * 1000),
            "updated_at": datetime.now(UTC),
        }
        try:
            stored = self.commit(session, record, values)
        except StorageUnavailableError:
            self.unstored.append((record, values))
            raise
        if not stored:
            raise ConflictError(
                "The record was deleted or closed while it was generated.", record_id=record.id
            )
        metrics.FINISHED.labels(ending.status).inc()
        metrics.TOKENS.inc(ending.completion_tokens)
        event(
            log,
            logging.ERROR if ending.status is Status.FAILED else logging.INFO,
            "record finished",
            id=record.id,
            status=ending.status.value,
            finish_reason=ending.finish_reason.value,
            tokens=ending.completion_tokens,
            ms=values["duration_ms"],
        )
        if ending.error is not None:
            raise ending.error(record_id=record.id)
        for name, value in values.items():
            setattr(record, name, value)
        return record

    def commit(self, session: Session, record: GenerationRecord, values: dict[str, Any]) -> bool:
        """Store a record's end, trying again while the database refuses; False if it is not ours.

        Each further try is alone: what cannot be stored takes no other with it. Trying again is
        safe: the row is only written while it is in progress, and a commit that took effect
        without saying so is recognised by what it wrote.
        """
        end = RecordEnd(record.owner_id, record.id, values)
        for attempt in range(FINISH_ATTEMPTS):
            time.sleep(attempt * FINISH_PAUSE_SECONDS)
            try:
                if attempt == 0:
                    return self.crowds.write(records.finish_all, end, record.id)
                return commit_alone(session, record, values)
            except (StorageUnavailableError, SpoiltError):
                event(
                    log, logging.ERROR, "record not finished yet", id=record.id, attempt=attempt + 1
                )
        raise StorageUnavailableError(
            "The text was generated but the database did not take it.", record_id=record.id
        )

    def store_unstored(self) -> None:
        """Store the endings that the database refused. Raises StorageUnavailableError."""
        while self.unstored:
            record, values = self.unstored[0]
            with self.database.sessions() as session:
                commit_alone(session, record, values)
            self.unstored.popleft()
            self.lease.drop(record.id)
            event(log, logging.WARNING, "record finished late", id=record.id)


def commit_alone(session: Session, record: GenerationRecord, values: dict[str, Any]) -> bool:
    """Another try; True as well where an earlier one took effect."""
    with transaction(session):
        stored = records.finish(session, record.owner_id, record.id, **values)
        return stored or is_stored(session, record, values)


def is_stored(session: Session, record: GenerationRecord, values: dict[str, Any]) -> bool:
    found = records.get(session, record.owner_id, record.id)
    return found is not None and all(getattr(found, name) == v for name, v in values.items())
