"""Queries on the titles of conversations, and on what a title was made of.

Where no client gave a title or a prompt to make one of, it is made of the first message, whose
text is not copied: ``initial_prompt`` says ``OF_FIRST_MESSAGE``, so that the title goes when the
message goes. A prompt that a client gave is the client's, unless the first message says the same;
such are the copies, too, that earlier versions made.
"""

from collections.abc import Collection, Sequence

from sqlalchemy import ColumnElement, and_, func, not_, or_, select, true, update
from sqlalchemy.orm import Session, aliased

from models import Conversation, GenerationRecord
from repositories import search
from words import title_words

OF_FIRST_MESSAGE = ""  # no client can give it
TITLE_OF_NOTHING = "Text removed"


def row(conversation: Conversation) -> tuple[int, str]:
    return conversation.id, title_words(conversation.title, conversation.owner_id)


def index_again(session: Session, conversation_id: int) -> None:
    """After a title has changed. The change must have been flushed."""
    search.drop(session, search.TITLES, [conversation_id])
    statement = select(Conversation.title, Conversation.owner_id)
    found = session.execute(statement.where(Conversation.id == conversation_id)).one()
    search.put(session, search.TITLES, [(conversation_id, title_words(*found))])


def made_of(first: ColumnElement[bool]) -> ColumnElement[bool]:
    """A conversation whose title was made of its first message, where that meets a condition."""
    message = GenerationRecord
    earlier, source = aliased(message), aliased(message)
    before = and_(earlier.conversation_id == message.conversation_id, earlier.id < message.id)
    copied = Conversation.initial_prompt == func.coalesce(source.own_prompt, message.own_prompt)
    found = (
        select(message.id)
        .outerjoin(source, message.source_id == source.id)
        .where(message.conversation_id == Conversation.id, first)
        .where(~select(earlier.id).where(before).exists())
        .where(or_(Conversation.initial_prompt == OF_FIRST_MESSAGE, copied))
    )
    return and_(Conversation.initial_prompt.is_not(None), found.exists())


def remove(session: Session, conversation_ids: Sequence[int]) -> None:
    """Titles, and what they were made from; the conversations stay."""
    values = {"title": TITLE_OF_NOTHING, "title_pending": None, "initial_prompt": None}
    change(session, Conversation.id.in_(conversation_ids), **values)
    for conversation_id in conversation_ids:
        index_again(session, conversation_id)


def remove_made_of(session: Session, leaving: Collection[int]) -> None:
    """Before messages, or their texts, go: the titles that were made of them go too."""
    thread = GenerationRecord.conversation_id
    threads = select(thread).where(GenerationRecord.id.in_(leaving), thread.is_not(None))
    if not (ids := set(session.scalars(threads))):
        return
    made = made_of(GenerationRecord.id.in_(leaving))
    found = select(Conversation.id).where(Conversation.id.in_(ids), made)
    remove(session, sorted(session.scalars(found)))


def remove_unclaimed(session: Session, conversation_ids: Collection[int]) -> None:
    """Prompts whose titles are made, and that are no message's: where its first message was
    deleted by an earlier version, nothing tells whose such a prompt was."""
    conversation = Conversation
    made = and_(conversation.title_pending.is_(None), conversation.initial_prompt.is_not(None))
    unclaimed = and_(conversation.id.in_(conversation_ids), made, not_(made_of(true())))
    change(session, unclaimed, initial_prompt=None)


def drop_copy(
    session: Session, conversation_id: int, first: ColumnElement[bool] | None = None
) -> None:
    """The title goes with the first message, of whose text no copy is left."""
    made = and_(Conversation.id == conversation_id, made_of(true() if first is None else first))
    change(session, made, initial_prompt=OF_FIRST_MESSAGE)


def give(session: Session, conversation_id: int) -> None:
    """The title is a client's own from now on, not made of the first message."""
    made = and_(Conversation.id == conversation_id, made_of(true()))
    change(session, made, initial_prompt=None)


def change(session: Session, which: ColumnElement[bool], **values: str | None) -> None:
    statement = update(Conversation).where(which).values(**values)
    session.execute(statement.execution_options(synchronize_session=False))
