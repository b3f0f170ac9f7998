"""Queries that take a person out: every record of a user, and the conversations they held."""

from dataclasses import dataclass, field

from sqlalchemy import ColumnElement, and_, func, select
from sqlalchemy.orm import Session

from models import Conversation, GenerationRecord
from repositories import removal, retention, titles


@dataclass
class Taken:
    """What a batch took out, and by which keys the cache may have pointed at it.

    It had ``seen`` so many records; some of them others may have deleted meanwhile.
    """

    seen: int
    records: int = 0
    conversations: int = 0
    cache_keys: list[str] = field(default_factory=list)


def of_user(owner_id: str | None, user_id: str) -> ColumnElement[bool]:
    mine = GenerationRecord.user_id == user_id
    return mine if owner_id is None else and_(GenerationRecord.owner_id == owner_id, mine)


def take_out(session: Session, theirs: ColumnElement[bool], count: int) -> Taken:
    """Delete the first of a user's records, in whatever state; a conversation that holds none any
    more goes too, and one that a user began loses what its title was made of.
    """
    record = GenerationRecord
    first = select(record.id, record.conversation_id).where(theirs).order_by(record.id)
    seen = session.execute(first.limit(count)).all()
    threads = {thread for _, thread in seen if thread is not None}
    # Before their records, as by whoever changes a message: neither waits for the other then.
    retention.hold_conversations(session, threads)
    held = select(record.id, record.cache_key).where(record.id.in_([id for id, _ in seen]), theirs)
    found = session.execute(held.order_by(record.id).with_for_update()).all()
    ids = [id for id, _ in found]
    begun = begun_by(session, threads, ids)
    taken = Taken(len(seen), removal.remove_all(session, ids))
    taken.cache_keys = [key for _, key in found if key is not None]
    taken.conversations = remove_empty(session, threads)
    retention.remove_titles(session, sorted(begun), Conversation.id.in_(begun))
    titles.remove_unclaimed(session, threads)
    return taken


def begun_by(session: Session, threads: set[int], ids: list[int]) -> set[int]:
    """Conversations whose first message is one of the records."""
    thread = GenerationRecord.conversation_id
    first = select(thread).where(thread.in_(threads)).group_by(thread)
    return set(session.scalars(first.having(func.min(GenerationRecord.id).in_(ids))))


def remove_empty(session: Session, threads: set[int]) -> int:
    holds = select(GenerationRecord.id).where(GenerationRecord.conversation_id == Conversation.id)
    return retention.remove_conversations(session, sorted(threads), ~holds.exists())
