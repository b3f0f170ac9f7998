"""One generation: plan it, accept it, let the engine run it, finish it.

The prompt is committed before the model runs and the text before the client hears of it. No
connection is held in between.
"""

import logging
import secrets
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import Session

import metrics
from database import transaction
from engine.errors import EngineFullError, EngineStoppedError, GenerationError
from engine.sampling import SamplingParams
from errors import (
    DeadlineExceededError,
    GenerationFailedError,
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
from services.model_host import ModelHost

if TYPE_CHECKING:
    from engine.engine import Engine, Generation
    from engine.loading import LoadedModel

log = logging.getLogger(__name__)

DEFAULT_NEW_TOKENS = 50  # so the default max_length is the prompt and 50 more
FINISH_ATTEMPTS = 3
STATUS_OF = {
    FinishReason.STOP: Status.COMPLETED,
    FinishReason.LENGTH: Status.COMPLETED,
    FinishReason.CANCELLED: Status.CANCELLED,
    FinishReason.INTERRUPTED: Status.INCOMPLETE,
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
    completion: str = ""
    completion_tokens: int = 0
    error: type[ServiceError] | None = None


class GenerationService:
    """``timeout`` is the longest a generation may take, waiting included, in seconds."""

    def __init__(
        self, models: ModelHost, content_filter: ContentFilter, lease: LeaseKeeper, timeout: float
    ) -> None:
        self.models = models
        self.content_filter = content_filter
        self.lease = lease
        self.timeout = timeout

    def generate(
        self, session: Session, owner_id: str, request: GenerateRequest
    ) -> GenerationRecord:
        """Answer a prompt with a stored record. Raises ServiceErrors."""
        self.content_filter.check(request.prompt)
        model, engine = self.models.running()
        plan = make_plan(model, request)
        with admitted(engine, plan) as generation:
            began = time.monotonic()
            record = self.accept(session, owner_id, request, plan)
            ending = self.run(generation)
            return self.finish(session, record, ending, time.monotonic() - began)

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
        event(log, logging.INFO, "record accepted", id=record.id, tokens=record.prompt_tokens)
        return record

    def run(self, generation: "Generation") -> Ending:
        generation.start()
        try:
            completion = generation.result(self.timeout)
        except TimeoutError:
            generation.cancel()
            return failure(DeadlineExceededError)
        except GenerationError:
            return failure(GenerationFailedError)
        except EngineStoppedError:
            return Ending(Status.INCOMPLETE, FinishReason.INTERRUPTED, error=ModelNotReadyError)
        reason = FinishReason(completion.finish_reason.value)
        return Ending(
            STATUS_OF[reason],
            reason,
            completion.text,
            len(completion.token_ids),
            error=None if STATUS_OF[reason] is Status.COMPLETED else ModelNotReadyError,
        )

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
        if not commit_ending(session, record, values):
            raise StorageUnavailableError(
                "The record was deleted or closed while it was generated.", record_id=record.id
            )
        metrics.FINISHED.labels(ending.status).inc()
        metrics.TOKENS.inc(ending.completion_tokens)
        event(
            log,
            logging.INFO if ending.error is None else logging.ERROR,
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


def admitted(engine: "Engine", plan: Plan) -> "Generation":
    """A place in the queue. Raises OverloadedError, ModelNotReadyError."""
    try:
        return engine.admit(plan.prompt_ids, plan.params)
    except EngineFullError:
        raise OverloadedError from None
    except EngineStoppedError:
        raise ModelNotReadyError from None


def failure(error: type[ServiceError]) -> Ending:
    return Ending(Status.FAILED, FinishReason.ERROR, error=error)


def commit_ending(session: Session, record: GenerationRecord, values: dict[str, Any]) -> bool:
    """Store a record's end, trying again while the database refuses; False if it is not ours.

    Trying again is safe: the row is only written while it is in progress, and a commit that took
    effect without saying so is recognised by what it wrote.
    """
    session.expunge(record)
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
