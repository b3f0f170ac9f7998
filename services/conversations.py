"""Conversations, and the records that are their messages.

A message is a generation record in a thread: what the user said is its prompt, what was answered
its completion. Nothing is stored twice.
"""

import logging
import time
from datetime import UTC, datetime

from sqlalchemy.orm import Session

from database import release, transaction
from errors import ConflictError, NotFoundError
from log import event
from models import (
    TERMINAL,
    Conversation,
    ConversationCreate,
    ConversationQuery,
    ConversationUpdate,
    FinishReason,
    GenerationRecord,
    MessageCreate,
    MessageUpdate,
    Page,
    Status,
)
from repositories import conversations, records
from services import history
from services.generation import Ask, GenerationService
from services.live import Live
from services.planning import CONTEXT_TURNS, plan_reply

log = logging.getLogger(__name__)

TITLE_LENGTH = 60  # characters of a title made from the first words
TURN_PATIENCE_SECONDS = 0.05


class ThreadMovedError(Exception):
    """Another message came into the thread first."""


def conversation_not_found() -> NotFoundError:
    return NotFoundError("Conversation not found")


def create(
    session: Session, owner_id: str, request: ConversationCreate, model_name: str
) -> Conversation:
    """A title that is not given is suggested later, by the model; until then, the first words."""
    now = datetime.now(UTC)
    first = request.initial_prompt or ""
    with transaction(session):
        conversation = conversations.add(
            session,
            owner_id,
            title=request.title or first_words(first) or "New conversation",
            title_pending=True if request.title is None and first else None,
            initial_prompt=first or None,
            model_type=request.model_type or model_name,
            created_at=now,
            updated_at=now,
        )
    event(log, logging.INFO, "conversation created", id=conversation.id)
    return conversation


def first_words(text: str) -> str:
    line = " ".join(text.split())
    if len(line) <= TITLE_LENGTH:
        return line
    return line[:TITLE_LENGTH].rpartition(" ")[0] or line[:TITLE_LENGTH]


def get(session: Session, owner_id: str, conversation_id: int) -> Conversation:
    """Raises NotFoundError."""
    conversation = conversations.get(session, owner_id, conversation_id)
    if conversation is None:
        raise conversation_not_found()
    return conversation


def page(
    session: Session, owner_id: str, query: ConversationQuery
) -> tuple[list[Conversation], bool]:
    return conversations.page(session, owner_id, query)


def change(
    session: Session, owner_id: str, conversation_id: int, request: ConversationUpdate
) -> Conversation:
    """A title set by hand stays. Raises NotFoundError."""
    values = request.model_dump(exclude_none=True)
    if request.title is not None:
        values["title_pending"] = None
    with transaction(session):
        values["updated_at"] = datetime.now(UTC)
        if not conversations.change(session, owner_id, conversation_id, **values):
            raise conversation_not_found()
        return get(session, owner_id, conversation_id)


def delete(session: Session, owner_id: str, conversation_id: int) -> None:
    """Its messages go with it. Raises NotFoundError."""
    with transaction(session):
        if not conversations.remove(session, owner_id, conversation_id):
            raise conversation_not_found()
    event(log, logging.INFO, "conversation deleted", id=conversation_id)


def messages(
    session: Session, owner_id: str, conversation_id: int, query: Page
) -> tuple[list[GenerationRecord], bool]:
    """Oldest first. Raises NotFoundError."""
    get(session, owner_id, conversation_id)
    return conversations.messages(session, owner_id, conversation_id, query)


def message(session: Session, owner_id: str, message_id: int) -> GenerationRecord:
    """Raises NotFoundError, also for a record that is in no conversation."""
    try:
        record = history.get(session, owner_id, message_id)
    except NotFoundError:
        record = None
    if record is None or record.conversation_id is None:
        raise NotFoundError("Message not found")
    return record


def change_message(
    session: Session, owner_id: str, message_id: int, request: MessageUpdate
) -> GenerationRecord:
    """Correct a message by hand. Raises NotFoundError, ConflictError while it is generated."""
    given = request.model_dump(exclude_none=True)
    names = {"prompt_content": "prompt", "response_content": "completion"}
    with transaction(session):
        record = message(session, owner_id, message_id)
        if record.status not in TERMINAL:
            raise ConflictError("The message is being generated.", record_id=record.id)
        for name, value in given.items():
            setattr(record, names[name], value)
        record.updated_at = datetime.now(UTC)
        touch(session, owner_id, record.conversation_id)
    return record


def delete_message(session: Session, owner_id: str, message_id: int) -> None:
    """Raises NotFoundError."""
    with transaction(session):
        record = message(session, owner_id, message_id)
        records.remove(session, owner_id, record.id)
        touch(session, owner_id, record.conversation_id)


def touch(session: Session, owner_id: str, conversation_id: int | None) -> None:
    if conversation_id is not None:
        conversations.change(session, owner_id, conversation_id, updated_at=datetime.now(UTC))


class Replies:
    """Answers in threads: one at a time in each, every reply with the whole thread before it."""

    def __init__(self, generation: GenerationService) -> None:
        self.generation = generation

    def reply(
        self, session: Session, owner_id: str, conversation_id: int, request: MessageCreate
    ) -> GenerationRecord:
        """Store an exchange, generating what the request does not bring. Raises ServiceErrors."""
        if request.response_content is not None:
            return self.keep(session, owner_id, conversation_id, request)
        live = self.begin(session, owner_id, conversation_id, request, finish_alone=True)
        return self.generation.wait_for(session, live)

    def stream(
        self,
        session: Session,
        owner_id: str,
        conversation_id: int,
        request: MessageCreate,
        finish_alone: bool,
    ) -> Live:
        """Begin a reply; a producer goes on alone. Raises ServiceErrors."""
        live = self.begin(session, owner_id, conversation_id, request, finish_alone)
        return self.generation.let_go(live)

    def begin(
        self,
        session: Session,
        owner_id: str,
        conversation_id: int,
        request: MessageCreate,
        finish_alone: bool,
    ) -> Live:
        """Wait for the turn, then read the thread and take the next place in it, or try again."""
        deadline = time.monotonic() + self.generation.timeout
        ask = Ask(request.prompt_content, request, finish_alone, conversation_id)
        while time.monotonic() < deadline:
            get(session, owner_id, conversation_id)
            thread = conversations.latest(session, owner_id, conversation_id, CONTEXT_TURNS)
            release(session)
            if thread and thread[-1].status not in TERMINAL:
                time.sleep(TURN_PATIENCE_SECONDS)
                continue
            try:
                return self.take_turn(session, owner_id, ask, thread)
            except ThreadMovedError:
                continue
        raise ConflictError("Another reply in this conversation takes too long.")

    def take_turn(
        self, session: Session, owner_id: str, ask: Ask, thread: list[GenerationRecord]
    ) -> Live:
        assert ask.conversation_id is not None
        conversation_id, last = ask.conversation_id, thread[-1].id if thread else 0

        def enter(session: Session) -> None:
            if not conversations.is_at(session, owner_id, conversation_id, last):
                raise ThreadMovedError
            first = None if thread else ask.prompt
            self.announce(session, owner_id, conversation_id, first)

        turns = [(record.prompt, record.completion) for record in thread]
        return self.generation.begin(
            session,
            owner_id,
            ask,
            lambda model: plan_reply(model, turns, ask.prompt, ask.options),
            enter,
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

    def keep(
        self, session: Session, owner_id: str, conversation_id: int, request: MessageCreate
    ) -> GenerationRecord:
        """Store an exchange that happened elsewhere. Raises NotFoundError."""
        assert request.response_content is not None
        self.generation.content_filter.check(request.prompt_content)
        model, _ = self.generation.models.running()
        now = datetime.now(UTC)
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
            )
