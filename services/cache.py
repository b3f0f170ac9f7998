"""Work that was done before: the record store is the cache.

A record says in ``cache_key`` what work it did: a hash, keyed with a secret of the database, of
everything that its text depends on. An answer from the cache is a record of its own without a
text, which points at the one that has it. Redis, where there is one, only says under a key which
record to look at; what it says is checked against that record, so its loss or its lies cost time.
"""

import hashlib
import hmac
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta

import redis
from sqlalchemy.orm import Session

import metrics
from database import Database, release, transaction
from errors import DeadlineExceededError
from log import event
from models import GenerationRecord, Status
from repositories import cached, records, secrets
from services.idempotency import once_values
from services.live import LiveGenerations
from services.patience import Patience
from services.planning import Ask, Plan

log = logging.getLogger(__name__)

REDIS_SECONDS = 0.25  # a cache that answers later than that is slower than the database
REDIS_REST_SECONDS = 5.0  # after it failed, before it is asked again
FLIGHT_SECONDS = 0.1  # between two looks at work that another process does
PREFIX = "ai-database-service:answer:"


class ResponseCache:
    """``lifetime`` is how old an answer may be; zero turns the cache off."""

    def __init__(
        self,
        database: Database,
        live: LiveGenerations,
        lifetime: timedelta,
        redis_url: str | None,
    ) -> None:
        self.live = live
        self.lifetime = lifetime
        with database.sessions() as session:
            self.secret = secrets.get(session, "cache").encode()
        self.pointers = Pointers(redis_url, lifetime) if redis_url and lifetime else None

    def key(self, ask: Ask, plan: Plan) -> str | None:
        """What a request's text depends on, as a hash; None where it is not to be shared."""
        options = ask.options
        if not options.use_cache or not self.lifetime:
            return None
        params = asdict(plan.params) | {"seed": options.seed}  # one that was drawn says nothing
        model = [plan.model.fingerprint, plan.model.dtype]
        work = json.dumps(
            [ask.owner_id, options.user_id, ask.prompt, plan.prompt_ids, params, model]
        )
        return hmac.new(self.secret, work.encode(), hashlib.sha256).hexdigest()[:32]

    def answer(
        self,
        session: Session,
        ask: Ask,
        key: str,
        enter: Callable[[Session], None],
        patience: Patience,
    ) -> GenerationRecord | None:
        """Answer from the store, once whoever does the same work now is done; None: do it.

        Raises DeadlineExceededError, and OverloadedError where too many wait.
        """
        began = time.monotonic()
        while patience.left():
            source = self.find(session, ask.owner_id, key)
            if source is not None:
                kept = keep(session, ask, key, source, enter, time.monotonic() - began)
                if kept is not None:
                    return kept
                continue
            runs = cached.in_flight(session, ask.owner_id, key)
            release(session)
            if runs is None:
                return None
            if not self.live.wait_for_end(ask.owner_id, runs, patience.to_wait()):
                time.sleep(FLIGHT_SECONDS)
        raise DeadlineExceededError

    def find(self, session: Session, owner_id: str, key: str) -> GenerationRecord | None:
        """A complete answer to the same work that is not too old."""
        record = self.pointed_at(session, owner_id, key)
        if record is None:
            record = self.find_stored(session, owner_id, key)
            if record is not None and self.pointers is not None:
                self.pointers.set(key, record.id)
        release(session)
        return record

    def forget(self, keys: Sequence[str]) -> None:
        """The records that did this work are gone."""
        if self.pointers is not None:
            self.pointers.forget(keys)

    def find_stored(self, session: Session, owner_id: str, key: str) -> GenerationRecord | None:
        return cached.find(session, owner_id, key, self.oldest())

    def oldest(self) -> datetime:
        return datetime.now(UTC) - self.lifetime

    def pointed_at(self, session: Session, owner_id: str, key: str) -> GenerationRecord | None:
        record_id = self.pointers.get(key) if self.pointers is not None else None
        if record_id is None:
            return None
        record = records.get(session, owner_id, record_id)
        if record is None or record.cache_key != key or record.status != Status.COMPLETED:
            return None
        return record if record.created_at > self.oldest() else None


def keep(
    session: Session,
    ask: Ask,
    key: str,
    source: GenerationRecord,
    enter: Callable[[Session], None],
    seconds: float,
) -> GenerationRecord | None:
    """Commit that a request was answered with the text of another record.

    None where that text has been changed or taken since it was read.
    """
    now = datetime.now(UTC)
    with transaction(session):
        if not cached.hold(session, ask.owner_id, source.id, key):
            return None
        enter(session)
        record = cached.add(
            session,
            ask.owner_id,
            source,
            conversation_id=ask.conversation_id,
            user_id=ask.options.user_id,
            duration_ms=round(seconds * 1000),
            created_at=now,
            updated_at=now,
            **once_values(ask.once),
        )
    metrics.CACHED.inc()
    metrics.TOKENS_SAVED.inc(record.completion_tokens)
    event(log, logging.INFO, "record answered from another", id=record.id, source=source.id)
    return record


class Pointers:
    """Record ids by cache key in Redis, shared by all processes; none where it does not answer."""

    def __init__(self, url: str, lifetime: timedelta) -> None:
        self.lifetime = lifetime
        self.resting_until = 0.0
        self.failing = False
        self.client = redis.Redis.from_url(
            url,
            socket_timeout=REDIS_SECONDS,
            socket_connect_timeout=REDIS_SECONDS,
            retry=None,
        )

    def get(self, key: str) -> int | None:
        if time.monotonic() < self.resting_until:
            return None
        try:
            found = self.client.get(PREFIX + key)
        except (redis.RedisError, OSError) as error:
            self.rest(error)
            return None
        if not isinstance(found, bytes) or not found.isdigit() or len(found) > 18:
            return None
        return int(found)

    def set(self, key: str, record_id: int) -> None:
        if time.monotonic() < self.resting_until:
            return
        try:
            self.client.set(PREFIX + key, record_id, ex=self.lifetime)
            self.failing = False
        except (redis.RedisError, OSError) as error:
            self.rest(error)

    def forget(self, keys: Sequence[str]) -> None:
        """Point at nothing under these keys any more."""
        if not keys or time.monotonic() < self.resting_until:
            return
        try:
            self.client.delete(*(PREFIX + key for key in keys))
        except (redis.RedisError, OSError) as error:
            self.rest(error)

    def rest(self, error: Exception) -> None:
        """Do without for a while; warn when that begins."""
        self.resting_until = time.monotonic() + REDIS_REST_SECONDS
        if self.failing:
            return
        self.failing = True
        event(log, logging.WARNING, "redis does not answer", error=type(error).__name__)
