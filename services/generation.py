"""One generation: plan it, accept it, let the engine run it, finish it.

The prompt is committed before the model runs and the text before the client hears of it. No
connection is held in between.
"""

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import Session

import metrics
from database import Database, release, transaction
from engine.errors import EngineFullError, EngineStoppedError, GenerationError
from errors import (
    CancelledError,
    ConflictError,
    DeadlineExceededError,
    GenerationFailedError,
    InterruptedGenerationError,
    ModelNotReadyError,
    OverloadedError,
    ServiceError,
    StorageUnavailableError,
)
from log import event
from models import FinishReason, GenerateRequest, GenerationRecord, SamplingOptions, Status
from repositories import records
from services.content_filter import ContentFilter
from services.leases import LeaseKeeper
from services.live import Live, LiveGenerations
from services.model_host import ModelHost
from services.planning import Plan, plan_prompt

if TYPE_CHECKING:
    from engine.engine import Engine, Generation
    from engine.loading import LoadedModel

log = logging.getLogger(__name__)

FINISH_ATTEMPTS = 3
ENDINGS: dict[FinishReason, tuple[Status, type[ServiceError] | None]] = {
    FinishReason.STOP: (Status.COMPLETED, None),
    FinishReason.LENGTH: (Status.COMPLETED, None),
    FinishReason.CANCELLED: (Status.CANCELLED, CancelledError),
    FinishReason.DISCONNECTED: (Status.CANCELLED, CancelledError),
    FinishReason.INTERRUPTED: (Status.INCOMPLETE, InterruptedGenerationError),
}


@dataclass(frozen=True)
class Ask:
    """What a client wants: a prompt continued, alone or as a message of a conversation."""

    prompt: str
    options: SamplingOptions
    finish_alone: bool
    conversation_id: int | None = None


@dataclass(frozen=True)
class Ending:
    """How a generation ended: what goes into its row, and the error its client gets, if any."""

    status: Status
    finish_reason: FinishReason
    completion: str
    completion_tokens: int
    error: type[ServiceError] | None = None


class GenerationService:
    """``timeout`` is the longest a generation may take, waiting included, in seconds."""

    def __init__(
        self,
        database: Database,
        models: ModelHost,
        content_filter: ContentFilter,
        lease: LeaseKeeper,
        live: LiveGenerations,
        timeout: float,
    ) -> None:
        self.database = database
        self.models = models
        self.content_filter = content_filter
        self.lease = lease
        self.live = live
        self.timeout = timeout
        self.unstored: deque[tuple[GenerationRecord, dict[str, Any]]] = deque()
        # A producer waits most of its life, and admission bounds how many there are.
        self.producers = ThreadPoolExecutor(models.capacity, thread_name_prefix="producer")

    def generate(
        self, session: Session, owner_id: str, request: GenerateRequest
    ) -> GenerationRecord:
        """Answer a prompt with a stored record. Raises ServiceErrors."""
        return self.wait_for(session, self.continue_prompt(session, owner_id, request, True))

    def stream(
        self, session: Session, owner_id: str, request: GenerateRequest, finish_alone: bool
    ) -> Live:
        """Begin answering a prompt; a producer goes on alone. Raises ServiceErrors."""
        return self.let_go(self.continue_prompt(session, owner_id, request, finish_alone))

    def continue_prompt(
        self, session: Session, owner_id: str, request: GenerateRequest, finish_alone: bool
    ) -> Live:
        ask = Ask(request.prompt, request, finish_alone)
        return self.begin(
            session, owner_id, ask, lambda model: plan_prompt(model, ask.prompt, ask.options)
        )

    def begin(
        self,
        session: Session,
        owner_id: str,
        ask: Ask,
        plan: "Callable[[LoadedModel], Plan]",
        enter: Callable[[Session], None] = lambda _: None,
    ) -> Live:
        """Validate, take a place in the queue, store the prompt.

        ``enter`` is called in the transaction that stores it, and may refuse by raising.
        """
        self.content_filter.check(ask.prompt)
        model, engine = self.models.running()
        planned = plan(model)
        generation = admitted(engine, planned)
        try:
            record = self.accept(session, owner_id, ask, planned, enter)
        except BaseException:
            generation.cancel()
            raise
        live = Live(record, generation, ask.finish_alone)
        self.live.add(live)
        return live

    def wait_for(self, session: Session, live: Live) -> GenerationRecord:
        """Run it here. Raises ServiceErrors."""
        outcome = self.produce(session, live)
        if isinstance(outcome, ServiceError):
            raise outcome
        return outcome

    def let_go(self, live: Live) -> Live:
        """Run it in a producer's thread."""
        self.producers.submit(self.produce_alone, live)
        return live

    def produce_alone(self, live: Live) -> None:
        with self.database.sessions() as session:
            self.produce(session, live)

    def produce(self, session: Session, live: Live) -> GenerationRecord | ServiceError:
        """Run a generation to its end, store that, and then tell whoever waits for it."""
        outcome: GenerationRecord | ServiceError = GenerationFailedError(record_id=live.record.id)
        try:
            with live.generation:
                ending = self.run(live.generation)
            outcome = self.finish(session, live.record, ending, live.seconds())
        except ServiceError as error:
            outcome = error
        except Exception:
            log.exception("a generation was not finished")
        finally:
            self.live.end(live, outcome)
        return outcome

    def accept(
        self,
        session: Session,
        owner_id: str,
        ask: Ask,
        plan: Plan,
        enter: Callable[[Session], None],
    ) -> GenerationRecord:
        """Commit the prompt. From here on it cannot be lost."""
        now = datetime.now(UTC)
        parameters = asdict(plan.params)
        seed = parameters.pop("seed")
        with transaction(session):
            enter(session)
            record = records.add(
                session,
                owner_id,
                conversation_id=ask.conversation_id,
                user_id=ask.options.user_id,
                prompt=ask.prompt,
                completion="",
                model_name=plan.model.name,
                model_fingerprint=plan.model.fingerprint,
                dtype=plan.model.dtype,
                parameters=parameters,
                seed=seed,
                prompt_tokens=len(plan.prompt_ids),
                completion_tokens=0,
                created_at=now,
                updated_at=now,
                lease_id=self.lease.lease_id,
            )
        session.expunge(record)  # from here on it passes between threads, not sessions
        event(log, logging.INFO, "record accepted", id=record.id, tokens=record.prompt_tokens)
        return record

    def run(self, generation: "Generation") -> Ending:
        error: type[ServiceError] | None = None
        try:
            generation.start()
            generation.result(self.timeout)
        except TimeoutError:
            generation.cancel()
            error = DeadlineExceededError
        except GenerationError:
            error = GenerationFailedError
        except EngineStoppedError:
            error = InterruptedGenerationError
        return ending_of(generation, error)

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
            stored = commit_ending(session, record, values)
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

    def store_unstored(self) -> None:
        """Store the endings that the database refused. Raises StorageUnavailableError."""
        while self.unstored:
            record, values = self.unstored[0]
            with self.database.sessions() as session, transaction(session):
                records.finish(session, record.owner_id, record.id, **values)
            self.unstored.popleft()
            event(log, logging.WARNING, "record finished late", id=record.id)


def admitted(engine: "Engine", plan: Plan) -> "Generation":
    """A place in the queue. Raises OverloadedError, ModelNotReadyError."""
    try:
        return engine.admit(plan.prompt_ids, plan.params)
    except EngineFullError:
        raise OverloadedError from None
    except EngineStoppedError:
        raise ModelNotReadyError from None


def ending_of(generation: "Generation", error: type[ServiceError] | None) -> Ending:
    """What is kept of a generation that has ended, well or not: always the text it came to."""
    snapshot = generation.snapshot()
    text, tokens = snapshot.text, len(snapshot.token_ids)
    if error is InterruptedGenerationError:
        return Ending(Status.INCOMPLETE, FinishReason.INTERRUPTED, text, tokens, error)
    if error is not None:
        return Ending(Status.FAILED, FinishReason.ERROR, text, tokens, error)
    assert snapshot.finish_reason is not None
    reason = FinishReason(snapshot.finish_reason.value)
    status, error = ENDINGS[reason]
    return Ending(status, reason, text, tokens, error)


def commit_ending(session: Session, record: GenerationRecord, values: dict[str, Any]) -> bool:
    """Store a record's end, trying again while the database refuses; False if it is not ours.

    Trying again is safe: the row is only written while it is in progress, and a commit that took
    effect without saying so is recognised by what it wrote.
    """
    for attempt in range(FINISH_ATTEMPTS):
        try:
            with transaction(session):
                stored = records.finish(session, record.owner_id, record.id, **values)
            return stored or (attempt > 0 and is_stored(session, record, values))
        except StorageUnavailableError:
            event(log, logging.ERROR, "record not finished yet", id=record.id, attempt=attempt + 1)
    raise StorageUnavailableError(
        "The text was generated but the database did not take it.", record_id=record.id
    )


def is_stored(session: Session, record: GenerationRecord, values: dict[str, Any]) -> bool:
    found = records.get(session, record.owner_id, record.id)
    same = found is not None and all(getattr(found, name) == v for name, v in values.items())
    release(session)
    return same
