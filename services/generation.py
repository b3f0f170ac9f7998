"""One generation: plan it, accept it, let the engine run it, finish it.

The prompt is committed before the model runs and the text before the client hears of it. No
connection is held in between.
"""

import logging
import secrets
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import Session

import metrics
from database import Database, transaction
from engine.errors import EngineFullError, EngineStoppedError, GenerationError
from engine.sampling import SamplingParams
from errors import (
    CancelledError,
    ConflictError,
    DeadlineExceededError,
    GenerationFailedError,
    InterruptedGenerationError,
    InvalidRequestError,
    ModelNotReadyError,
    OverloadedError,
    ServiceError,
    StorageUnavailableError,
)
from log import event
from models import FinishReason, GenerateRequest, GenerationRecord, Status
from repositories import records
from services.content_filter import ContentFilter
from services.leases import LeaseKeeper
from services.live import Live, LiveGenerations
from services.model_host import ModelHost

if TYPE_CHECKING:
    from engine.engine import Engine, Generation
    from engine.loading import LoadedModel

log = logging.getLogger(__name__)

DEFAULT_NEW_TOKENS = 50  # so the default max_length is the prompt and 50 more
FINISH_ATTEMPTS = 3
ENDINGS: dict[FinishReason, tuple[Status, type[ServiceError] | None]] = {
    FinishReason.STOP: (Status.COMPLETED, None),
    FinishReason.LENGTH: (Status.COMPLETED, None),
    FinishReason.CANCELLED: (Status.CANCELLED, CancelledError),
    FinishReason.DISCONNECTED: (Status.CANCELLED, CancelledError),
    FinishReason.INTERRUPTED: (Status.INCOMPLETE, InterruptedGenerationError),
}


@dataclass(frozen=True)
class Plan:
    """A request made exact: what the engine is asked for, and by which model."""

    model: "LoadedModel"
    prompt_ids: list[int]
    params: SamplingParams


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
        self.producers = ThreadPoolExecutor(models.max_waiting, thread_name_prefix="producer")

    def generate(
        self, session: Session, owner_id: str, request: GenerateRequest
    ) -> GenerationRecord:
        """Answer a prompt with a stored record. Raises ServiceErrors."""
        live = self.begin(session, owner_id, request, finish_alone=True)
        outcome = self.produce(session, live)
        if isinstance(outcome, ServiceError):
            raise outcome
        return outcome

    def stream(
        self, session: Session, owner_id: str, request: GenerateRequest, finish_alone: bool
    ) -> Live:
        """Begin answering a prompt; a producer goes on alone. Raises ServiceErrors."""
        live = self.begin(session, owner_id, request, finish_alone)
        self.producers.submit(self.produce_alone, live)
        return live

    def begin(
        self, session: Session, owner_id: str, request: GenerateRequest, finish_alone: bool
    ) -> Live:
        """Validate, take a place in the queue, store the prompt, and let the engine go."""
        self.content_filter.check(request.prompt)
        model, engine = self.models.running()
        plan = make_plan(model, request)
        generation = admitted(engine, plan)
        try:
            live = Live(self.accept(session, owner_id, request, plan), generation, finish_alone)
        except BaseException:
            generation.cancel()
            raise
        self.live.add(live)
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
        self, session: Session, owner_id: str, request: GenerateRequest, plan: Plan
    ) -> GenerationRecord:
        """Commit the prompt. From here on it cannot be lost."""
        parameters = asdict(plan.params)
        seed = parameters.pop("seed")
        with transaction(session):
            record = records.add(
                session,
                owner_id,
                user_id=request.user_id,
                prompt=request.prompt,
                completion="",
                model_name=plan.model.name,
                model_fingerprint=plan.model.fingerprint,
                dtype=plan.model.dtype,
                parameters=parameters,
                seed=seed,
                prompt_tokens=len(plan.prompt_ids),
                completion_tokens=0,
                created_at=datetime.now(UTC),
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
    session.rollback()
    return same


def make_plan(model: "LoadedModel", request: GenerateRequest) -> Plan:
    """Fill in what the request left open and refuse what cannot be done.

    Raises InvalidRequestError when the prompt leaves no room for one new token.
    """
    prompt_ids = model.encode(request.prompt)
    given, own = request, model.defaults
    params = SamplingParams(
        max_new_tokens=new_tokens(len(prompt_ids), request.max_length, model.context_size),
        seed=secrets.randbits(63) if given.seed is None else given.seed,
        temperature=own.temperature if given.temperature is None else given.temperature,
        top_k=own.top_k if given.top_k is None else given.top_k,
        top_p=own.top_p if given.top_p is None else given.top_p,
        repetition_penalty=own.repetition_penalty,
        stop=tuple(given.stop),
    )
    return Plan(model, prompt_ids, params)


def new_tokens(prompt: int, max_length: int | None, context: int) -> int:
    """How many tokens to generate after ``prompt`` tokens. Raises InvalidRequestError."""
    if prompt >= context:
        raise InvalidRequestError(
            f"The prompt is {prompt} tokens long, and the model's context is {context} tokens:"
            " it leaves no room for one new token."
        )
    if max_length is None:
        return min(DEFAULT_NEW_TOKENS, context - prompt)
    if prompt >= max_length:
        raise InvalidRequestError(
            f"The prompt is {prompt} tokens long, and max_length is {max_length} tokens, prompt"
            " included: it leaves no room for one new token."
        )
    return min(max_length, context) - prompt
