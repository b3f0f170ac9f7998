"""One generation as the scheduler and the runners see it. Plain data: no torch, no text, no locks.

A sequence's tokens are its prompt followed by its output. The runner has computed the first
``computed`` of them (their keys and values are stored); what is left is its pending work.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from engine.sampling import FinishReason, SamplingParams


class Status(StrEnum):
    """``ADMITTED`` holds a place in the queue but may not run yet."""

    ADMITTED = "admitted"
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


TERMINAL = frozenset({Status.FINISHED, Status.CANCELLED, Status.FAILED})


@dataclass(eq=False, slots=True)
class Sequence:
    """Compared by identity: two requests for the same text are two sequences."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    output_ids: list[int] = field(default_factory=list)
    computed: int = 0
    status: Status = Status.ADMITTED
    finish_reason: FinishReason | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def longest(self) -> int:
        """Tokens at most, the last of which is never run through the model."""
        return len(self.prompt_ids) + self.params.max_new_tokens

    @property
    def decoding(self) -> bool:
        return bool(self.output_ids)

    @property
    def ended(self) -> bool:
        return self.status in TERMINAL
