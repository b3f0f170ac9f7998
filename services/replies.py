"""Answers in threads: one at a time in each, every reply with the whole thread before it."""

import time
from collections.abc import Callable
from datetime import UTC, datetime

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from database import release, transaction
from errors import ConflictError
from models import TERMINAL, FinishReason, GenerationRecord, MessageCreate, Status
from repositories import conversations, records
from services.accepting import TakenError
from services.conversations import conversation_not_found, first_words, get
from services.generation import Answer, GenerationService
from services.idempotency import Key, Once, once_of, once_values
from services.live import Live
from services.planning import CONTEXT_TURNS, Ask, plan_reply, turns_of

TURN_PATIENCE_SECONDS = 0.05


class ThreadMovedError(Exception):
    """Another message came into the thread first."""


class Replies:
    def __init__(self, generation: GenerationService) -> None:
        self.generation = generation

    def reply(
        self,
        session: Session,
        owner_id: str,
        conversation_id: int,
        request: MessageCreate,
        key: Key | None = None,
    ) -> Answer:
        """Store an exchange, generating what the request does not bring. Raises ServiceErrors."""
        if request.response_content is not None:
            return self.keep(session, owner_id, conversation_id, request, key)
        begun = self.begin(session, owner_id, conversation_id, request, True, key)
        return self.generation.wait_for(session, begun)

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
        begun = self.begin(session, owner_id, conversation_id, request, finish_alone, key)
        return self.generation.let_go(begun)

    def begin(
        self,
        session: Session,
        owner_id: str,
        conversation_id: int,
        request: MessageCreate,
        finish_alone: bool,
        key: Key | None,
    ) -> Live | Answer:
        once = once_of(key, request)
        ask = Ask(owner_id, request.prompt_content, request, finish_alone, conversation_id, once)

        def begin(first: GenerationRecord | None) -> Live | Answer:
            if first is None:
                return self.wait_for_turn(session, owner_id, ask, conversation_id)
            before = conversations.latest(
                session, owner_id, conversation_id, CONTEXT_TURNS, before=first.id
            )
            release(session)
            return self.answer(session, ask, before, again=first)

        return self.generation.once(session, ask, begin)

    def wait_for_turn(
        self, session: Session, owner_id: str, ask: Ask, conversation_id: int
    ) -> Live | Answer:
        """Wait for the turn, then read the thread and take the next place in it, or try again."""
        deadline = time.monotonic() + self.generation.timeout
        while time.monotonic() < deadline:
            get(session, owner_id, conversation_id)
            thread = conversations.latest(session, owner_id, conversation_id, CONTEXT_TURNS)
            release(session)
            running = next((said for said in thread if said.status not in TERMINAL), None)
            if running is not None:
                self.wait_for_end(running, deadline - time.monotonic())
                continue

            def enter(session: Session, thread: list[GenerationRecord] = thread) -> None:
                self.take_turn(session, owner_id, conversation_id, thread, ask.prompt)

            try:
                return self.answer(session, ask, thread, enter)
            except ThreadMovedError:
                continue
        raise ConflictError("Another reply in this conversation takes too long.")

    def wait_for_end(self, running: GenerationRecord, timeout: float) -> None:
        """Until it has ended, if it runs here; a moment where another process runs it."""
        live = self.generation.live
        if not live.wait_for_end(running.owner_id, running.id, timeout):
            time.sleep(TURN_PATIENCE_SECONDS)

    def take_turn(
        self,
        session: Session,
        owner_id: str,
        conversation_id: int,
        thread: list[GenerationRecord],
        prompt: str,
    ) -> None:
        """Raises ThreadMovedError where the thread is not what was read any more."""
        last = thread[-1].id if thread else 0
        if not conversations.is_at(session, owner_id, conversation_id, last):
            raise ThreadMovedError
        self.announce(session, owner_id, conversation_id, None if thread else prompt)

    def answer(
        self,
        session: Session,
        ask: Ask,
        thread: list[GenerationRecord],
        enter: Callable[[Session], None] = lambda _: None,
        again: GenerationRecord | None = None,
    ) -> Live | Answer:
        turns = turns_of(thread)
        return self.generation.begin(
            session,
            ask,
            lambda model: plan_reply(model, turns, ask.prompt, ask.options),
            enter,
            again,
        )

    def announce(
        self, session: Session, owner_id: str, conversation_id: int, first: str | None
    ) -> None:
        """Note in the conversation that a message comes; with the first one it wants a title."""
        conversation = conversations.get(session, owner_id, conversation_id)
        if conversation is None:
            raise conversation_not_found()
        conversation.updated_at = datetime.now(UTC)
        untitled = conversation.title == "New conversation" and conversation.initial_prompt is None
        if first is not None and untitled:
            conversation.title = first_words(first) or conversation.title
            conversation.initial_prompt = first
            conversation.title_pending = True
            session.flush()
            conversations.index_title_again(session, conversation_id)

    def keep(
        self,
        session: Session,
        owner_id: str,
        conversation_id: int,
        request: MessageCreate,
        key: Key | None,
    ) -> Answer:
        """Store an exchange that happened elsewhere. Raises NotFoundError."""
        self.generation.content_filter.check(request.prompt_content)
        once = once_of(key, request)
        ask = Ask(owner_id, request.prompt_content, request, True, conversation_id, once)

        def store(_: GenerationRecord | None) -> Live | Answer:
            return Answer(self.store(session, owner_id, conversation_id, request, ask.once))

        return self.generation.wait_for(session, self.generation.once(session, ask, store))

    def store(
        self,
        session: Session,
        owner_id: str,
        conversation_id: int,
        request: MessageCreate,
        once: Once | None,
    ) -> GenerationRecord:
        assert request.response_content is not None
        model, _ = self.generation.models.running()
        now = datetime.now(UTC)
        try:
            with transaction(session):
                conversation = get(session, owner_id, conversation_id)
                conversation.updated_at = now
                return records.add(
                    session,
                    owner_id,
                    conversation_id=conversation_id,
                    user_id=request.user_id,
                    prompt=request.prompt_content,
                    completion=request.response_content,
                    model_name=conversation.model_type,
                    model_fingerprint="",
                    dtype="",
                    parameters={},
                    seed=0,
                    prompt_tokens=len(model.encode(request.prompt_content)),
                    completion_tokens=len(model.encode(request.response_content)),
                    created_at=now,
                    updated_at=now,
                    duration_ms=0,
                    status=Status.COMPLETED,
                    finish_reason=FinishReason.STOP,
                    **once_values(once),
                )
        except IntegrityError:
            raise TakenError from None
