"""Answers in threads: one at a time in each, every reply with the whole thread before it.

A prompt passes the content filter whichever way it comes into a thread: the model reads all that
was said there, sooner or later.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from database import release, transaction
from errors import ConflictError, DeadlineExceededError
from models import (
    TERMINAL,
    Conversation,
    ConversationCreate,
    FinishReason,
    GenerationRecord,
    MessageCreate,
    MessageUpdate,
    Status,
)
from repositories import conversations, records, titles
from services.accepting import TakenError
from services.conversations import NO_MODEL, change_message, create, first_words, get
from services.generation import Answer, GenerationService
from services.idempotency import Key, once_of, once_values
from services.live import Live
from services.patience import Patience
from services.planning import CONTEXT_TURNS, MessageAsk, plan_reply, turns_of
from services.turns import Turns

TURN_PATIENCE_SECONDS = 0.05


class ThreadMovedError(Exception):
    """Another message came into the thread first."""


def too_long() -> ConflictError:
    return ConflictError("Another reply in this conversation takes too long.")


class Replies:
    def __init__(self, generation: GenerationService) -> None:
        self.generation = generation
        self.turns = Turns()

    def open(self, session: Session, owner_id: str, request: ConversationCreate) -> Conversation:
        """Begin a conversation. Raises ContentRefusedError."""
        if request.initial_prompt is not None:
            self.generation.content_filter.check(request.initial_prompt)
        return create(session, owner_id, request, self.generation.models.model_name())

    def correct(
        self, session: Session, owner_id: str, message_id: int, request: MessageUpdate
    ) -> GenerationRecord:
        """Change a message by hand. Raises ContentRefusedError, NotFoundError, ConflictError."""
        if request.prompt_content is not None:
            self.generation.content_filter.check(request.prompt_content)
        model = self.generation.models.model
        given = request.model_dump(exclude_none=True)
        tokens = {name: len(model.encode(text)) for name, text in given.items() if model}
        return change_message(session, owner_id, message_id, request, tokens)

    def reply(
        self,
        session: Session,
        owner_id: str,
        conversation_id: int,
        request: MessageCreate,
        key: Key | None = None,
    ) -> Answer:
        """Store an exchange, generating what the request does not bring. Raises ServiceErrors."""
        ask = message_ask(owner_id, conversation_id, request, True, key)
        begin = self.begin if request.response_content is None else self.keep
        return self.generation.wait_for(session, begin(session, ask))

    def stream(
        self,
        session: Session,
        owner_id: str,
        conversation_id: int,
        request: MessageCreate,
        finish_alone: bool,
        key: Key | None = None,
    ) -> Live | Answer:
        """Begin a reply; a producer goes on alone. Raises ServiceErrors."""
        ask = message_ask(owner_id, conversation_id, request, finish_alone, key)
        return self.generation.let_go(self.begin(session, ask))

    def begin(self, session: Session, ask: MessageAsk) -> Live | Answer:
        return self.generation.once(session, ask, partial(self.wait_for_turn, session, ask))

    def wait_for_turn(
        self,
        session: Session,
        ask: MessageAsk,
        again: GenerationRecord | None,
        patience: Patience,
    ) -> Live | Answer:
        """Wait for the turn, then read the thread and take the next place in it, or try again.

        ``again`` is a first try that was cut short: it is answered in its old place.
        """
        with self.turn_in(ask, patience):
            while patience.left():
                seen, thread = read_conversation(session, ask)
                running = next((said for said in thread if said.status not in TERMINAL), None)
                if running is not None:
                    self.wait_for_end(running, patience.to_wait())
                    continue
                enter = partial(take_turn, ask, seen, thread)
                with contextlib.suppress(ThreadMovedError):
                    return self.answer(session, ask, thread, patience, enter, again)
        raise too_long()

    @contextlib.contextmanager
    def turn_in(self, ask: MessageAsk, patience: Patience) -> Iterator[None]:
        """Of all messages here for one conversation only one looks whether it can be answered.

        The others stand in line: what each would do there for nothing is what the first does.
        """
        turn = self.turns.of(f"{ask.owner_id} {ask.conversation_id}", patience)
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(turn)
            except DeadlineExceededError:
                raise too_long() from None
            yield

    def wait_for_end(self, running: GenerationRecord, timeout: float) -> None:
        """Until it has ended, if it runs here; a moment where another process runs it."""
        live = self.generation.live
        if not live.wait_for_end(running.owner_id, running.id, timeout):
            time.sleep(TURN_PATIENCE_SECONDS)

    def answer(
        self,
        session: Session,
        ask: MessageAsk,
        thread: list[GenerationRecord],
        patience: Patience,
        enter: Callable[[Session], None],
        again: GenerationRecord | None,
    ) -> Live | Answer:
        before = thread if again is None else read_thread(session, ask, before=again.id)
        turns = turns_of(before)
        return self.generation.begin(
            session,
            ask,
            lambda model: plan_reply(model, turns, ask.prompt, ask.options),
            patience,
            enter,
            again,
        )

    def keep(self, session: Session, ask: MessageAsk) -> Live | Answer:
        """Store an exchange that happened elsewhere. Raises NotFoundError."""
        self.generation.content_filter.check(ask.prompt)

        def store(_: GenerationRecord | None, __: Patience) -> Live | Answer:
            return Answer(self.store(session, ask))

        return self.generation.once(session, ask, store)

    def store(self, session: Session, ask: MessageAsk) -> GenerationRecord:
        response = ask.options.response_content
        assert response is not None
        model, _ = self.generation.models.running()
        now = datetime.now(UTC)
        try:
            with transaction(session):
                conversations.hold(session, ask.owner_id, ask.conversation_id)
                conversation = get(session, ask.owner_id, ask.conversation_id)
                conversation.updated_at = now
                return records.add(
                    session,
                    ask.owner_id,
                    conversation_id=ask.conversation_id,
                    user_id=ask.options.user_id,
                    prompt=ask.prompt,
                    completion=response,
                    model_name=conversation.model_type,
                    model_fingerprint=NO_MODEL,
                    dtype="",
                    parameters={},
                    seed=0,
                    prompt_tokens=len(model.encode(ask.prompt)),
                    completion_tokens=len(model.encode(response)),
                    created_at=now,
                    updated_at=now,
                    duration_ms=0,
                    status=Status.COMPLETED,
                    finish_reason=FinishReason.STOP,
                    **once_values(ask.once),
                )
        except IntegrityError:
            raise TakenError from None


def message_ask(
    owner_id: str,
    conversation_id: int,
    request: MessageCreate,
    finish_alone: bool,
    key: Key | None,
) -> MessageAsk:
    once = once_of(key, request)
    return MessageAsk(
        owner_id, request.prompt_content, request, finish_alone, conversation_id, once
    )


def read_conversation(session: Session, ask: MessageAsk) -> tuple[datetime, list[GenerationRecord]]:
    """When it was changed last, and its thread; read in this order. Raises NotFoundError."""
    conversation = get(session, ask.owner_id, ask.conversation_id)
    return conversation.updated_at, read_thread(session, ask)


def read_thread(
    session: Session, ask: MessageAsk, before: int | None = None
) -> list[GenerationRecord]:
    """The latest messages of a conversation, oldest first; those before one where it is named."""
    owner_id, conversation_id = ask.owner_id, ask.conversation_id
    thread = conversations.latest(session, owner_id, conversation_id, CONTEXT_TURNS, before=before)
    release(session)
    return thread


def take_turn(
    ask: MessageAsk, seen: datetime, thread: list[GenerationRecord], session: Session
) -> None:
    """Note in the conversation that a message comes.

    Raises ThreadMovedError where the thread is not what was read any more: it has another end, or
    a message in its middle is answered once more.
    """
    last = thread[-1].id if thread else 0
    if not conversations.is_at(session, ask.owner_id, ask.conversation_id, last):
        raise ThreadMovedError
    conversation = get(session, ask.owner_id, ask.conversation_id)
    if conversation.updated_at != seen:
        raise ThreadMovedError
    conversation.updated_at = datetime.now(UTC)
    if not thread:
        want_title(session, conversation, ask.prompt)


def want_title(session: Session, conversation: Conversation, first: str) -> None:
    """A conversation that was begun without a title gets one, made from its first message."""
    if conversation.title_pending is not False:
        return
    conversation.title = first_words(first) or conversation.title
    conversation.title_pending = True
    conversation.initial_prompt = titles.OF_FIRST_MESSAGE
    session.flush()
    titles.index_again(session, conversation.id)
