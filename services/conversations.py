"""Conversations, and the records that are their messages.

A message is a generation record in a thread: what the user said is its prompt, what was answered
its completion. Nothing is stored twice.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime

from sqlalchemy.orm import Session

from database import transaction
from errors import ConflictError, NotFoundError
from log import event
from models import (
    TERMINAL,
    Conversation,
    ConversationCreate,
    ConversationOut,
    ConversationQuery,
    ConversationUpdate,
    GenerationRecord,
    MessageUpdate,
    Page,
)
from reader import Reader
from repositories import conversations, records, removal
from services import history
from services.live import Live

log = logging.getLogger(__name__)

TITLE_LENGTH = 60  # characters of a title made from the first words
NO_MODEL = ""  # the fingerprint of a record whose text, as it stands, no model has made


def conversation_not_found() -> NotFoundError:
    return NotFoundError("Conversation not found")


def message_not_found() -> NotFoundError:
    return NotFoundError("Message not found")


def create(
    session: Session, owner_id: str, request: ConversationCreate, model_name: str
) -> Conversation:
    """A title that is not given is suggested later, by the model; until then, the first words.

    Where there are none yet either, it waits for the first message.
    """
    now = datetime.now(UTC)
    first = request.initial_prompt or ""
    with transaction(session):
        conversation = conversations.add(
            session,
            owner_id,
            title=request.title or first_words(first) or "New conversation",
            title_pending=None if request.title is not None else bool(first),
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


async def read(reader: Reader, owner_id: str, conversation_id: int) -> ConversationOut:
    """A conversation as it is answered, in one statement. Raises NotFoundError."""
    row = await reader.row(conversations.SHOWN, owner_id=owner_id, conversation_id=conversation_id)
    if row is None:
        raise conversation_not_found()
    return conversations.as_answered(row)


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
        conversation = get(session, owner_id, conversation_id)
        if any(getattr(conversation, name) != value for name, value in values.items()):
            values["updated_at"] = datetime.now(UTC)
            if not conversations.change(session, owner_id, conversation_id, **values):
                raise conversation_not_found()
            session.refresh(conversation)
        return conversation


def delete(
    session: Session, owner_id: str, conversation_id: int, running: Sequence[Live] = ()
) -> None:
    """Its messages go with it. Raises NotFoundError."""
    with transaction(session):
        if not conversations.remove(session, owner_id, conversation_id):
            raise conversation_not_found()
    history.stop(running, lambda record: record.conversation_id == conversation_id)
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
        raise message_not_found()
    return record


@contextlib.contextmanager
def changing(session: Session, owner_id: str, message_id: int) -> Iterator[GenerationRecord]:
    """A transaction in which a message is held, after its conversation. Raises NotFoundError."""
    with transaction(session):
        record = message(session, owner_id, message_id)
        assert record.conversation_id is not None
        conversations.hold(session, owner_id, record.conversation_id)
        records.hold(session, [message_id])  # retention, say, holds no conversation
        session.expire(record)  # it may have been changed, or deleted, until it was held
        yield message(session, owner_id, message_id)


def change_message(
    session: Session,
    owner_id: str,
    message_id: int,
    request: MessageUpdate,
    tokens: Mapping[str, int] | None = None,
) -> GenerationRecord:
    """Correct a message by hand. ``tokens`` are those of the new texts, by the fields' names.

    Raises NotFoundError, ConflictError while it is generated.
    """
    with changing(session, owner_id, message_id) as record:
        if record.status not in TERMINAL:
            raise ConflictError("The message is being generated.", record_id=record.id)
        given = request.model_dump(exclude_none=True)
        others = {field: text for field, text in given.items() if text != getattr(record, field)}
        if not others:
            return record
        removal.separate(session, record)
        rewrite(record, others, tokens or {})
        record.updated_at = datetime.now(UTC)
        session.flush()
        records.index_again(session, [record.id])
        touch(session, owner_id, record.conversation_id)
    return record


def rewrite(record: GenerationRecord, texts: Mapping[str, str], tokens: Mapping[str, int]) -> None:
    """Put other texts in the place of a message's own, and note that no model made them.

    Each text's tokens change with it. Where they are not known, because no tokenizer is loaded,
    the old number stays: an estimate is better than to refuse the change. A prompt's are its own
    from then on, as of a message that was brought along; before, the thread's were among them.
    """
    columns = {
        "prompt_content": ("prompt", "prompt_tokens"),
        "response_content": ("completion", "completion_tokens"),
    }
    for field, text in texts.items():
        text_column, tokens_column = columns[field]
        setattr(record, text_column, text)
        record.model_fingerprint = NO_MODEL
        record.text_removed_at = None  # there is one again, for retention to remove
        if field in tokens:
            setattr(record, tokens_column, tokens[field])


def delete_message(
    session: Session, owner_id: str, message_id: int, running: Sequence[Live] = ()
) -> None:
    """Raises NotFoundError."""
    with changing(session, owner_id, message_id) as record:
        removal.remove(session, owner_id, record.id)
        touch(session, owner_id, record.conversation_id)
    history.stop(running, lambda record: record.id == message_id)


def touch(session: Session, owner_id: str, conversation_id: int | None) -> None:
    if conversation_id is not None:
        conversations.change(session, owner_id, conversation_id, updated_at=datetime.now(UTC))
