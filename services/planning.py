"""Makes a request exact: which tokens the model reads, and how it chooses the next ones."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from engine.sampling import SamplingParams
from errors import InvalidRequestError
from models import GenerationRecord, MessageCreate, SamplingOptions
from services.idempotency import Once

if TYPE_CHECKING:
    from engine.loading import LoadedModel

DEFAULT_NEW_TOKENS = 50  # so the default max_length is the prompt and 50 more
SEED_BITS = 53  # of a drawn seed: JavaScript and jq round longer numbers, into other seeds
CONTEXT_TURNS = 200  # the most that a reply looks back; a model's context ends before
Turn = tuple[str, str]  # what the user said, what was answered


@dataclass(frozen=True)
class Ask:
    """What a client wants: a prompt continued, alone or as a message of a conversation."""

    owner_id: str
    prompt: str
    options: SamplingOptions
    finish_alone: bool
    conversation_id: int | None = None
    once: Once | None = None


@dataclass(frozen=True)
class MessageAsk(Ask):
    """A message of a conversation, with or without a response that it brings along."""

    options: MessageCreate
    conversation_id: int


@dataclass(frozen=True)
class Plan:
    """What the engine is asked for, and by which model."""

    model: "LoadedModel"
    prompt_ids: list[int]
    params: SamplingParams

    def seeded(self, seed: int) -> "Plan":
        return replace(self, params=replace(self.params, seed=seed))


def plan_prompt(model: "LoadedModel", prompt: str, options: SamplingOptions) -> Plan:
    """Continue a prompt. Raises InvalidRequestError when it leaves no room for one new token."""
    prompt_ids = model.encode(prompt)
    room = new_tokens(len(prompt_ids), options.max_length, model.context_size)
    return Plan(model, prompt_ids, sampling_params(model, options, room))


def plan_reply(
    model: "LoadedModel", thread: Sequence[Turn], prompt: str, options: SamplingOptions
) -> Plan:
    """Answer in a thread: as many of its latest turns as the context holds, oldest left out first.

    ``max_length`` counts the tokens of the prompt and of the reply, as for a prompt alone. Raises
    InvalidRequestError when not even the prompt leaves room.
    """
    own = len(model.encode(prompt))
    bare, stop = model.encode_thread([], prompt)
    room = new_tokens(own, options.max_length, model.context_size, frame=len(bare) - own)
    params = sampling_params(model, options, room)
    ids = fit_thread(model, thread, prompt, room)
    return Plan(model, ids, replace(params, stop=params.stop + stop))


def turns_of(thread: Sequence[GenerationRecord]) -> list[Turn]:
    """What was said, as far as its text is still there."""
    return [(said.prompt, said.completion) for said in thread if said.text_removed_at is None]


def fit_thread(model: "LoadedModel", thread: Sequence[Turn], prompt: str, room: int) -> list[int]:
    """Token ids of the thread's latest turns and the prompt that leave ``room`` for the reply.

    The turns' tokens are counted one by one, each once: to encode the whole again for each turn
    that is left out takes seconds. In the whole a turn can have a token more or less than alone,
    so the whole decides.
    """
    space = model.context_size - room
    first = first_that_fits(model, thread, prompt, space)
    ids, _ = model.encode_thread(thread[first:], prompt)
    while len(ids) > space and first < len(thread):
        first += 1
        ids, _ = model.encode_thread(thread[first:], prompt)
    while first > 0:
        more, _ = model.encode_thread(thread[first - 1 :], prompt)
        if len(more) > space:
            break
        first, ids = first - 1, more
    return ids


def first_that_fits(model: "LoadedModel", thread: Sequence[Turn], prompt: str, space: int) -> int:
    """The oldest turn from which on all should fit, by the sum of their tokens."""
    bare = len(model.encode_thread([], "")[0])
    used = len(model.encode_thread([], prompt)[0])
    for number in reversed(range(len(thread))):
        used += len(model.encode_thread([thread[number]], "")[0]) - bare
        if used > space:
            return number + 1
    return 0


def sampling_params(model: "LoadedModel", given: SamplingOptions, room: int) -> SamplingParams:
    """The request's own options, the model's where it left them open."""
    own = model.defaults
    return SamplingParams(
        max_new_tokens=room,
        seed=secrets.randbits(SEED_BITS) if given.seed is None else given.seed,
        temperature=own.temperature if given.temperature is None else given.temperature,
        top_k=own.top_k if given.top_k is None else given.top_k,
        top_p=own.top_p if given.top_p is None else given.top_p,
        repetition_penalty=own.repetition_penalty,
        stop=tuple(given.stop),
    )


def new_tokens(prompt: int, max_length: int | None, context: int, frame: int = 0) -> int:
    """How many tokens to generate after ``prompt`` tokens, where ``frame`` more say whose turn it
    is. Raises InvalidRequestError."""
    room = context - frame
    if prompt >= room:
        framed = f", of which {frame} mark the turns" if frame else ""
        raise InvalidRequestError(
            f"The prompt is {prompt} tokens long, and the model's context is {context}"
            f" tokens{framed}: it leaves no room for one new token."
        )
    if max_length is None:
        return min(DEFAULT_NEW_TOKENS, room - prompt)
    if prompt >= max_length:
        raise InvalidRequestError(
            f"The prompt is {prompt} tokens long, and max_length is {max_length} tokens, prompt"
            " included: it leaves no room for one new token."
        )
    return min(max_length, room) - prompt
