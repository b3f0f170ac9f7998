"""What a caller asks of one generation, and what comes back: plain data, without torch."""

from dataclasses import dataclass
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a text ended. The engine gives the first four; ``disconnected`` and ``interrupted`` are
    its callers' words for a client that went away and a process that died."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"
    DISCONNECTED = "disconnected"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. With equal parameters and an equal prompt the text is equal.

    ``temperature`` 0 is greedy and ignores the filters; ``top_k`` 0 and ``top_p`` 1.0 filter
    nothing; ``repetition_penalty`` 1.0 penalises nothing (Keskar et al. 2019). Filters apply in
    the order of Transformers: penalty, temperature, top-k, top-p.
    """

    max_new_tokens: int
    seed: int
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """A model's own generation configuration, as Transformers' pipeline reads it."""

    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished continuation, without the prompt and without the end-of-text token.

    ``text`` is what ``token_ids`` decode to after the prompt, cut before a stop string.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
