"""Stores what was asked before the model runs: first the row, then the work."""

import logging
from collections.abc import Callable
from dataclasses import asdict
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
                return reopened(session, again, values)
            return self.insert(session, ask, values, cache_key)

        # What may be refused must not spoil the others' transaction.
        refusable = enter is not nothing or again or cache_key or ask.once
        record = self.alone(session, store) if refusable else self.with_others(session, store)
        event(
            log,
            logging.INFO,
            "record accepted",
            id=record.id,
            tokens=record.prompt_tokens,
            attempt=record.attempts,
        )
        return record

    def with_others(
        self, session: Session, store: Callable[[Session], GenerationRecord]
    ) -> GenerationRecord:
        """In one transaction with what else is written now; alone where that fails."""
        held: list[int] = []

        def hold(session: Session) -> GenerationRecord:
            record = store(session)
            held.append(self.lease.hold(record.id))
            return record

        try:
            return self.crowds.write(hold)
        except BaseException as error:
            for record_id in held:
                self.lease.drop(record_id)
            if isinstance(error, SpoiltError):
                return self.alone(session, store)
            raise

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

    def insert(
        self, session: Session, ask: Ask, values: dict[str, Any], cache_key: str | None
    ) -> GenerationRecord:
        now = datetime.now(UTC)
        record = records.add(
            session,
            ask.owner_id,
            conversation_id=ask.conversation_id,
            user_id=ask.options.user_id,
            prompt=ask.prompt,
            created_at=now,
            cache_key=cache_key,
            flight_key=cache_key,
            attempts=1,
            **values,
            **once_values(ask.once),
        )
        # Who did the same work may have ended between our look into the store and this row.
        if cache_key is not None and self.cache.find_stored(session, ask.owner_id, cache_key):
            raise TakenError
        return record


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
