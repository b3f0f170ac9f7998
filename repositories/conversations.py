"""Queries on ``conversations`` and on the records that are their messages."""

from datetime import datetime
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from models import Conversation, ConversationQuery, GenerationRecord, Page, Status
from repositories.records import changed


def add(session: Session, owner_id: str, **values: Any) -> Conversation:
    conversation = Conversation(owner_id=owner_id, **values)
    session.add(conversation)
    session.flush()
    return conversation


def get(session: Session, owner_id: str, conversation_id: int) -> Conversation | None:
    return session.scalar(
        select(Conversation).where(
            Conversation.id == conversation_id, Conversation.owner_id == owner_id
        )
    )


def page(
    session: Session, owner_id: str, query: ConversationQuery
) -> tuple[list[Conversation], bool]:
    """Newest first, and whether more follow."""
    statement = (
        select(Conversation)
        .where(Conversation.owner_id == owner_id)
        .order_by(Conversation.id.desc())
        .limit(query.take + 1)
    )
    if query.after is not None:
        statement = statement.where(Conversation.id < query.after)
    if query.skip:
        statement = statement.offset(query.skip)
    found = list(session.scalars(statement))
    return found[: query.take], len(found) > query.take


def change(session: Session, owner_id: str, conversation_id: int, **values: Any) -> bool:
    return (
        changed(
            session,
            update(Conversation)
            .where(Conversation.id == conversation_id, Conversation.owner_id == owner_id)
            .values(**values)
            .execution_options(synchronize_session=False),
        )
        == 1
    )


def remove(session: Session, owner_id: str, conversation_id: int) -> bool:
    """Delete a conversation; its messages go with it."""
    conversation = get(session, owner_id, conversation_id)
    if conversation is None:
        return False
    session.delete(conversation)
    session.flush()
    return True


def messages(
    session: Session, owner_id: str, conversation_id: int, query: Page
) -> tuple[list[GenerationRecord], bool]:
    """Oldest first, and whether more follow."""
    statement = (
        select(GenerationRecord)
        .where(
            GenerationRecord.conversation_id == conversation_id,
            GenerationRecord.owner_id == owner_id,
        )
        .order_by(GenerationRecord.id)
        .limit(query.limit + 1)
    )
    if query.after is not None:
        statement = statement.where(GenerationRecord.id > query.after)
    found = list(session.scalars(statement))
    return found[: query.limit], len(found) > query.limit


def latest(
    session: Session, owner_id: str, conversation_id: int, count: int, before: int | None = None
) -> list[GenerationRecord]:
    """The newest ``count`` messages, or the newest ``before`` an id; oldest of them first."""
    statement = (
        select(GenerationRecord)
        .where(
            GenerationRecord.conversation_id == conversation_id,
            GenerationRecord.owner_id == owner_id,
        )
        .order_by(GenerationRecord.id.desc())
        .limit(count)
    )
    if before is not None:
        statement = statement.where(GenerationRecord.id < before)
    return list(session.scalars(statement))[::-1]


def is_at(session: Session, owner_id: str, conversation_id: int, last_id: int) -> bool:
    """Whether a conversation's newest message is ``last_id`` (0: it has none) and has ended."""
    found = latest(session, owner_id, conversation_id, 1)
    if not found:
        return last_id == 0
    return found[0].id == last_id and found[0].status != Status.IN_PROGRESS


def untitled(session: Session, count: int) -> list[Conversation]:
    """Conversations of whatever owner that wait for a title."""
    return list(
        session.scalars(
            select(Conversation).where(Conversation.title_pending.is_(True)).limit(count)
        )
    )


def suggest_title(session: Session, conversation_id: int, title: str, now: datetime) -> bool:
    """Set a title that nobody has set meanwhile."""
    return (
        changed(
            session,
            update(Conversation)
            .where(Conversation.id == conversation_id, Conversation.title_pending.is_(True))
            .values(title=title, title_pending=None, updated_at=now)
            .execution_options(synchronize_session=False),
        )
        == 1
    )
