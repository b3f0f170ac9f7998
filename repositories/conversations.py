"""Queries on ``conversations`` and on the records that are their messages."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Select, bindparam, select, union, update
from sqlalchemy.orm import Session

from lookup import Lookup
from models import Conversation, ConversationOut, ConversationQuery, GenerationRecord, Page, Status
from repositories import search, titles
from repositories.records import changed
from repositories.removal import hand_over
from words import MESSAGE_MARK, Term, mark, parse_search, record_marks

SAME_MARK = 10  # messages whose conversations may share a mark

ONE = select(Conversation).where(
    Conversation.id == bindparam("conversation_id"), Conversation.owner_id == bindparam("owner_id")
)

TABLE = Conversation.__table__
SHOWN = Lookup(
    select(*(TABLE.c[name] for name in ConversationOut.model_fields)).where(
        TABLE.c.id == bindparam("conversation_id"), TABLE.c.owner_id == bindparam("owner_id")
    )
)


def add(session: Session, owner_id: str, **values: Any) -> Conversation:
    conversation = Conversation(owner_id=owner_id, **values)
    session.add(conversation)
    session.flush()
    search.put(session, search.TITLES, [titles.row(conversation)])
    return conversation


def get(session: Session, owner_id: str, conversation_id: int) -> Conversation | None:
    return session.scalar(ONE, {"conversation_id": conversation_id, "owner_id": owner_id})


def as_answered(row: Sequence[Any]) -> ConversationOut:
    """A conversation from a row of ``SHOWN``."""
    return ConversationOut.model_validate(dict(zip(ConversationOut.model_fields, row, strict=True)))


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
    if query.q is not None:
        statement = statement.where(Conversation.id.in_(found_in(session, owner_id, query.q)))
    found = list(session.scalars(statement))
    return found[: query.take], len(found) > query.take


def found_in(session: Session, owner_id: str, q: str) -> Select[tuple[int]]:
    """The conversations that a search finds by their titles, or by one of their messages."""
    terms, owner = parse_search(q), mark("o", owner_id)
    titles = search.matching(session, search.TITLES, (terms, [owner]))
    hits = search.matching(session, search.RECORDS, (terms, [owner, MESSAGE_MARK])).subquery()
    messages = select(GenerationRecord.conversation_id).join(hits, GenerationRecord.id == hits.c[0])
    # MariaDB finds nothing when it takes a full-text search for a question about each row.
    found = union(titles, messages.where(GenerationRecord.owner_id == owner_id)).subquery()
    return select(found.c[0])


def newest_match(
    session: Session, owner_id: str, conversation_id: int, terms: Sequence[Term]
) -> GenerationRecord | None:
    """The newest message with the words that a search asks for."""
    marks = record_marks(owner_id, conversation_id=conversation_id)
    for message_id in search.hits(session, search.RECORDS, (terms, marks), SAME_MARK):
        found = session.get(GenerationRecord, message_id)
        if found is not None and found.conversation_id == conversation_id:
            return found
    return None


def change(session: Session, owner_id: str, conversation_id: int, **values: Any) -> bool:
    statement = (
        update(Conversation)
        .where(Conversation.id == conversation_id, Conversation.owner_id == owner_id)
        .values(**values)
        .execution_options(synchronize_session=False)
    )
    if changed(session, statement) != 1:
        return False
    if "title" in values:
        titles.give(session, conversation_id)
        titles.index_again(session, conversation_id)
    return True


def remove(session: Session, owner_id: str, conversation_id: int) -> bool:
    """Delete a conversation; its messages go with it."""
    if not hold(session, owner_id, conversation_id):
        return False
    conversation = get(session, owner_id, conversation_id)
    if conversation is None:
        return False
    hand_over(session, message_ids(session, conversation_id))
    session.delete(conversation)
    session.flush()
    return True


def message_ids(session: Session, conversation_id: int) -> set[int]:
    return set(
        session.scalars(
            select(GenerationRecord.id).where(GenerationRecord.conversation_id == conversation_id)
        )
    )


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


def hold(session: Session, owner_id: str, conversation_id: int) -> bool:
    """Take a conversation's row for the transaction; False if there is none any more.

    Whoever changes several of its rows takes this one first, so that of two at once one waits for
    the other's end, and neither for what the other waits for.
    """
    statement = (
        select(Conversation.id)
        .where(Conversation.id == conversation_id, Conversation.owner_id == owner_id)
        .with_for_update()
    )
    return session.scalar(statement) is not None


def is_at(session: Session, owner_id: str, conversation_id: int, last_id: int) -> bool:
    """Whether a conversation's newest message is ``last_id`` (0: it has none) and has ended.

    Holds the conversation's row, so that of two who ask at once one waits for the other's end.
    """
    hold(session, owner_id, conversation_id)
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


def beginning(session: Session, conversation: Conversation) -> str:
    """What a title is made from: the initial prompt, or else the first message's, if there is one.

    Read each time, not copied: a message's text goes with the message.
    """
    if conversation.initial_prompt:
        return conversation.initial_prompt
    first = session.scalar(
        select(GenerationRecord)
        .where(
            GenerationRecord.conversation_id == conversation.id,
            GenerationRecord.owner_id == conversation.owner_id,
        )
        .order_by(GenerationRecord.id)
        .limit(1)
    )
    return "" if first is None else first.prompt


def suggest_title(session: Session, conversation_id: int, title: str, now: datetime) -> bool:
    """Set a title that nobody has set meanwhile."""
    statement = (
        update(Conversation)
        .where(Conversation.id == conversation_id, Conversation.title_pending.is_(True))
        .values(title=title, title_pending=None, updated_at=now)
        .execution_options(synchronize_session=False)
    )
    if changed(session, statement) != 1:
        return False
    titles.drop_copy(session, conversation_id)
    titles.index_again(session, conversation_id)
    return True
