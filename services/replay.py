"""Run a stored record again and say whether it gives the same text."""

import logging
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from sqlalchemy.orm import Session

from database import release
from engine.errors import EngineStoppedError, GenerationError
from engine.sampling import Completion, SamplingParams
from errors import (
    ConflictError,
    DeadlineExceededError,
    GenerationFailedError,
    ModelNotReadyError,
)
from log import event
from models import GenerationRecord, Status
from repositories import conversations
from services import history
from services.conversations import NO_MODEL
from services.generation import admitted
from services.model_host import ModelHost
from services.planning import CONTEXT_TURNS, Plan, Turn, fit_thread, turns_of

if TYPE_CHECKING:
    from engine.loading import LoadedModel

log = logging.getLogger(__name__)


class Verdict(StrEnum):
    IDENTICAL = "identical"
    DIFFERENT = "different"
    MODEL_CHANGED = "model_changed"


@dataclass(frozen=True)
class Replay:
    """``first_difference`` is the place of the first differing token, 0 for the first generated."""

    id: int
    result: Verdict
    first_difference: int | None = None


def replay(
    session: Session, owner_id: str, record_id: int, models: ModelHost, timeout: float
) -> Replay:
    """Raises NotFoundError, ConflictError where no model made the text, and what running raises."""
    record = history.get(session, owner_id, record_id)
    thread = thread_before(session, record)
    release(session)  # no connection is held while the model runs
    refuse_without_generated_text(record)
    model, engine = models.running()
    if (record.model_fingerprint, record.dtype) != (model.fingerprint, model.dtype):
        return Replay(record.id, Verdict.MODEL_CHANGED)
    params = stored_params(record)
    if record.conversation_id is None:
        prompt_ids = model.encode(record.prompt)
    else:
        prompt_ids = fit_thread(model, thread, record.prompt, params.max_new_tokens)
    plan = Plan(model, prompt_ids, params)
    with admitted(engine, plan) as generation:
        generation.start()
        try:
            again = generation.result(timeout)
        except TimeoutError:
            raise DeadlineExceededError(record_id=record.id) from None
        except GenerationError:
            raise GenerationFailedError(record_id=record.id) from None
        except EngineStoppedError:
            raise ModelNotReadyError(record_id=record.id) from None
    verdict = compare(model, plan.prompt_ids, record, again)
    event(log, logging.INFO, "record replayed", id=record.id, result=verdict.result.value)
    return verdict


def refuse_without_generated_text(record: GenerationRecord) -> None:
    """Raises ConflictError."""
    if record.text_removed_at is not None:
        raise ConflictError("The record's text was removed: it was kept long enough.")
    if record.status not in (Status.COMPLETED, Status.INCOMPLETE, Status.CANCELLED):
        raise ConflictError("The record has no text to compare with.", record_id=record.id)
    if record.model_fingerprint == NO_MODEL:
        raise ConflictError(
            "This record's text was not generated as it stands: it was changed by hand, or came"
            " from elsewhere.",
            record_id=record.id,
        )


def thread_before(session: Session, record: GenerationRecord) -> list[Turn]:
    """What was said before a message, as the conversation has it today."""
    if record.conversation_id is None:
        return []
    found = conversations.latest(
        session, record.owner_id, record.conversation_id, CONTEXT_TURNS, before=record.id
    )
    return turns_of(found)


def stored_params(record: GenerationRecord) -> SamplingParams:
    stored = record.parameters
    return SamplingParams(**(stored | {"seed": record.seed, "stop": tuple(stored["stop"])}))


def compare(
    model: "LoadedModel", prompt_ids: list[int], record: GenerationRecord, again: Completion
) -> Replay:
    """A text that ended by itself must be the same; one that was cut short, its beginning."""
    cut = again.text[: len(record.completion)] if record.status != Status.COMPLETED else again.text
    if cut == record.completion:
        return Replay(record.id, Verdict.IDENTICAL)
    before = len(model.decode(prompt_ids))
    for place in range(len(again.token_ids)):
        text = model.decode(prompt_ids + list(again.token_ids[: place + 1]))[before:]
        if not record.completion.startswith(text.rstrip("\N{REPLACEMENT CHARACTER}")):
            return Replay(record.id, Verdict.DIFFERENT, place)
    return Replay(record.id, Verdict.DIFFERENT, len(again.token_ids))
