"""Stores what was asked before the model runs: first the row, then the work."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from database import transaction
from log import event
from models import GenerationRecord, Status
from repositories import records
from services.cache import ResponseCache
from services.crowds import Crowds, SpoiltError
from services.idempotency import once_values
from services.leases import LeaseKeeper
from services.planning import Ask, Plan

log = logging.getLogger(__name__)


class TakenError(Exception):
    """Another request with the same key, or for the same work, came first."""


def nothing(_: Session) -> None:
    """What most requests have to do in the transaction that stores them."""


@dataclass
class Entry:
    """A row to be stored, and its id once this process is known to run it."""

    record: GenerationRecord
    held: int | None = None


class Accepter:
    """Commits prompts: from there on they cannot be lost.

    A row that is there although its commit failed is closed by the lease's sweep, for nobody holds
    it.
    """

    def __init__(self, crowds: Crowds, cache: ResponseCache, lease: LeaseKeeper) -> None:
        self.crowds = crowds
        self.cache = cache
        self.lease = lease

    def accept(
        self,
        session: Session,
        ask: Ask,
        plan: Plan,
        enter: Callable[[Session], None] = nothing,
        again: GenerationRecord | None = None,
        cache_key: str | None = None,
    ) -> GenerationRecord:
        """The record that is in progress now: its first try's, if it has one.

        ``enter`` is called in the transaction that stores it, and may refuse by raising. Raises
        TakenError.
        """
        values = planned_values(plan) | {"lease_id": self.lease.lease_id}

        def store(session: Session) -> GenerationRecord:
            enter(session)
            if again is not None:
                return reopened(session, again, values | asked_again(ask, cache_key))
            record = new_record(ask, values, cache_key)
            records.add_all(session, [record])
            # Who did the same may have ended between our look into the store and this row.
            if cache_key is not None and self.cache.find_stored(session, ask.owner_id, cache_key):
                raise TakenError
            return record

        # What may be refused must not spoil the others' transaction.
        if enter is not nothing or again or cache_key or ask.once:
            record = self.alone(session, store)
        else:
            try:
                record = self.with_others(new_record(ask, values))
            except SpoiltError:
                record = self.alone(session, store)
        event(
            log,
            logging.INFO,
            "record accepted",
            id=record.id,
            tokens=record.prompt_tokens,
            attempt=record.attempts,
        )
        return record

    def with_others(self, record: GenerationRecord) -> GenerationRecord:
        """In one transaction with what else is written now. Raises SpoiltError."""
        entry = Entry(record)
        try:
            return self.crowds.write(self.insert_all, entry)
        except BaseException:
            if entry.held is not None:
                self.lease.drop(entry.held)
            raise

    def insert_all(self, session: Session, entries: list[Entry]) -> list[GenerationRecord]:
        found = [entry.record for entry in entries]
        records.add_all(session, found)
        for entry in entries:
            entry.held = self.lease.hold(entry.record.id)
        return found

    def alone(
        self, session: Session, store: Callable[[Session], GenerationRecord]
    ) -> GenerationRecord:
        held = None
        try:
            with transaction(session):
                record = store(session)
                held = self.lease.hold(record.id)
        except BaseException as error:
            if held is not None:
                self.lease.drop(held)
            if isinstance(error, IntegrityError):
                raise TakenError from None
            raise
        session.expunge_all()  # from here on it passes between threads, not sessions
        return record


def new_record(ask: Ask, values: dict[str, Any], cache_key: str | None = None) -> GenerationRecord:
    """The row of what is asked, not stored yet."""
    return GenerationRecord(
        owner_id=ask.owner_id,
        conversation_id=ask.conversation_id,
        user_id=ask.options.user_id,
        status=Status.IN_PROGRESS,
        prompt=ask.prompt,
        created_at=datetime.now(UTC),
        cache_key=cache_key,
        flight_key=cache_key,
        attempts=1,
        **values,
        **once_values(ask.once),
    )


def planned_values(plan: Plan) -> dict[str, Any]:
    """What a row says of the work before it is done: how to do it again."""
    parameters = asdict(plan.params)
    seed = parameters.pop("seed")
    return {
        "completion": "",
        "model_name": plan.model.name,
        "model_fingerprint": plan.model.fingerprint,
        "dtype": plan.model.dtype,
        "parameters": parameters,
        "seed": seed,
        "prompt_tokens": len(plan.prompt_ids),
        "completion_tokens": 0,
        "updated_at": datetime.now(UTC),
    }


def asked_again(ask: Ask, cache_key: str | None) -> dict[str, Any]:
    """What a row says of its request, whatever was made of it since the first try.

    It may have been corrected by hand, or taken by retention; and in a thread that was corrected
    it is other work now. Nobody waits for a second try: another may do the same.
    """
    return {
        "prompt": ask.prompt,
        "cache_key": cache_key,
        "flight_key": None,
        "text_removed_at": None,
    }


def reopened(
    session: Session, record: GenerationRecord, values: dict[str, Any]
) -> GenerationRecord:
    """A record that was cut short, in progress again. Raises TakenError."""
    if not records.reopen(session, record, **values):
        raise TakenError
    for name, value in values.items():
        setattr(record, name, value)
    record.attempts += 1
    record.status, record.finish_reason = Status.IN_PROGRESS, None
    return record
