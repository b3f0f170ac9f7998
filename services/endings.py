"""How a generation ends: what is kept of it, and what its client is told."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from errors import (
    CancelledError,
    GenerationFailedError,
    InterruptedGenerationError,
    ServiceError,
)
from models import FinishReason, GenerationRecord, Status

if TYPE_CHECKING:
    from engine.engine import Generation

ENDINGS: dict[FinishReason, tuple[Status, type[ServiceError] | None]] = {
    FinishReason.STOP: (Status.COMPLETED, None),
    FinishReason.LENGTH: (Status.COMPLETED, None),
    FinishReason.CANCELLED: (Status.CANCELLED, CancelledError),
    FinishReason.DISCONNECTED: (Status.CANCELLED, CancelledError),
    FinishReason.INTERRUPTED: (Status.INCOMPLETE, InterruptedGenerationError),
}


@dataclass(frozen=True)
class Ending:
    """How a generation ended: what goes into its row, and the error its client gets, if any."""

    status: Status
    finish_reason: FinishReason
    completion: str
    completion_tokens: int
    error: type[ServiceError] | None = None


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


def outcome(record: GenerationRecord) -> GenerationRecord | ServiceError:
    """What a record that has ended means to whoever asked for it."""
    errors: dict[str, type[ServiceError]] = {
        Status.INCOMPLETE: InterruptedGenerationError,
        Status.CANCELLED: CancelledError,
        Status.FAILED: GenerationFailedError,
    }
    error = errors.get(record.status)
    return record if error is None else error(record_id=record.id)
