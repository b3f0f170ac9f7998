"""Stores how generations ended: first the row, then the answer."""

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy.exc import DataError
from sqlalchemy.orm import Session

import metrics
from database import Database, kind, release, transaction
from errors import (
    ConflictError,
    GenerationFailedError,
    InterruptedGenerationError,
    ServiceError,
    StorageUnavailableError,
)
from log import event
from models import FinishReason, GenerationRecord, Status
from repositories import records
from repositories.records import RecordEnd
from services.crowds import Crowds, SpoiltError
from services.endings import Ending
from services.leases import LeaseKeeper

log = logging.getLogger(__name__)

FINISH_ATTEMPTS = 3
FINISH_PAUSE_SECONDS = 0.5  # more after each: a server that was restarted is back by then
UNSTORED_SECONDS = 5.0  # for one round of tries with what the database refused

Values = Mapping[str, Any]

# What drivers say of a value that no column takes: to try again is in vain.
UNSTORABLE = (DataError, OverflowError, UnicodeError)


class Finisher:
    """Commits endings, and keeps those that the database refused until it takes them."""

    def __init__(self, database: Database, crowds: Crowds, lease: LeaseKeeper) -> None:
        self.database = database
        self.crowds = crowds
        self.lease = lease
        self.unstored: deque[tuple[GenerationRecord, Values]] = deque()
        self.round = threading.Lock()  # at the end of a process there may be two

    def finish(
        self, session: Session, record: GenerationRecord, ending: Ending, seconds: float
    ) -> GenerationRecord:
        """Commit the end. Only what is stored is answered."""
        values = {
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
        if stored is None:
            raise closed(session, record)
        tell("record finished", record, stored)
        if stored is not values:
            raise GenerationFailedError(
                "The database cannot hold the text that the model made.", record_id=record.id
            )
        if ending.error is not None:
            raise ending.error(record_id=record.id)
        for name, value in values.items():
            setattr(record, name, value)
        return record

    def commit(self, session: Session, record: GenerationRecord, values: Values) -> Values | None:
        """Store a record's end, trying again while the database refuses.

        What was stored; None if the record is not ours any more. Each further try is alone: what
        cannot be stored takes no other with it. Trying again is safe: the row is only written while
        it is in progress, and a commit that took effect without saying so is recognised by what it
        wrote.
        """
        end = end_of(record, values)
        for attempt in range(FINISH_ATTEMPTS):
            time.sleep(attempt * FINISH_PAUSE_SECONDS)
            try:
                if attempt == 0:
                    return (
                        values
                        if self.crowds.write(records.finish_all, end, end.record_id)
                        else None
                    )
                return commit_alone(session, record, values)
            except (StorageUnavailableError, SpoiltError, *UNSTORABLE):
                event(
                    log, logging.ERROR, "record not finished yet", id=record.id, attempt=attempt + 1
                )
        raise StorageUnavailableError(
            "The text was generated but the database did not take it.", record_id=record.id
        )

    def store_unstored(self) -> None:
        """Try the endings that the database refused once more; those that it refuses again wait.

        Each has its turn, but a round does not last long: it begins with whose turn is next.
        """
        deadline = time.monotonic() + UNSTORED_SECONDS
        with self.round:
            for _ in range(len(self.unstored)):
                if time.monotonic() > deadline:
                    return
                if self.store_late(*self.unstored[0]):
                    self.unstored.popleft()
                else:
                    self.unstored.rotate(-1)

    def store_late(self, record: GenerationRecord, values: Values) -> bool:
        """False where it is refused again, for whatever reason: the others go on."""
        try:
            with self.database.sessions() as session:
                stored = commit_alone(session, record, values)
        except Exception as error:
            event(log, logging.ERROR, "record not finished yet", id=record.id, error=kind(error))
            return False
        self.lease.drop(record.id)
        if stored is None:
            event(log, logging.WARNING, "record was closed before its end", id=record.id)
        else:
            tell("record finished late", record, stored)
        return True


def tell(what: str, record: GenerationRecord, stored: Values) -> None:
    """Count and log a record that has ended."""
    tokens = stored.get("completion_tokens", 0)
    metrics.FINISHED.labels(stored["status"]).inc()
    metrics.TOKENS.inc(tokens)
    event(
        log,
        logging.ERROR if stored["status"] is Status.FAILED else logging.INFO,
        what,
        id=record.id,
        status=stored["status"].value,
        finish_reason=stored["finish_reason"].value,
        tokens=tokens,
        ms=stored["duration_ms"],
    )


def closed(session: Session, record: GenerationRecord) -> ServiceError:
    """What a client is told whose record was not in progress any more when it was to be ended."""
    found = records.get(session, record.owner_id, record.id)
    release(session)
    if found is None:
        return ConflictError("The record was deleted while it was generated.", record_id=record.id)
    return InterruptedGenerationError(record_id=record.id)  # this process was taken for dead


def end_of(record: GenerationRecord, values: Values) -> RecordEnd:
    return RecordEnd(record.owner_id, record.id, values, record.attempts)


def commit_alone(session: Session, record: GenerationRecord, values: Values) -> Values | None:
    """Another try. Where the database takes no such text, the record failed with what it has."""
    try:
        return values if is_written(session, record, values) else None
    except (StorageUnavailableError, *UNSTORABLE) as error:
        if not isinstance(error, UNSTORABLE) and not isinstance(error.__cause__, UNSTORABLE):
            raise
    event(log, logging.ERROR, "record holds what the database does not take", id=record.id)
    failed = {name: values[name] for name in ("duration_ms", "updated_at")}
    failed |= {"status": Status.FAILED, "finish_reason": FinishReason.ERROR}
    return failed if is_written(session, record, failed) else None


def is_written(session: Session, record: GenerationRecord, values: Values) -> bool:
    """Write a record's end; True as well where an earlier try took effect."""
    with transaction(session):
        (stored,) = records.finish_all(session, [end_of(record, values)])
        return stored or is_stored(session, record, values)


def is_stored(session: Session, record: GenerationRecord, values: Values) -> bool:
    found = records.get(session, record.owner_id, record.id)
    return found is not None and all(getattr(found, name) == v for name, v in values.items())
