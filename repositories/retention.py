"""Queries on what has been kept long enough, of whatever owner, a few rows at a time.

What is old is found by the blocks of ids that have old records. Pinned records stay, and so does
what is in progress.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime

from sqlalchemy import ColumnElement, and_, delete, func, not_, or_, select
from sqlalchemy.orm import Session

from models import TERMINAL, Conversation, GenerationRecord, RecordBlock
from repositories import records, removal, titles
from repositories.blocks import BITS

LONGEST_RANGE = 1 << 18  # ids that one query may have to look through

Condition = ColumnElement[bool]
Range = tuple[int, int]


def older(before: datetime) -> Condition:
    """A record that has been kept long enough."""
    record = GenerationRecord
    old = record.created_at < before
    return and_(old, record.pinned.is_(False), record.status.in_(sorted(TERMINAL)))


def answered(condition: Condition) -> Condition:
    """Answers from the cache only: where they go before what they show, few are left to get it."""
    return and_(condition, GenerationRecord.source_id.is_not(None))


def has_old_text(before: datetime, since: datetime | None) -> Condition:
    """A record whose text has been, while the record itself stays."""
    condition = and_(older(before), GenerationRecord.text_removed_at.is_(None))
    return condition if since is None else and_(condition, GenerationRecord.created_at >= since)


def old_blocks(session: Session, before: datetime) -> list[int]:
    """Blocks of ids that may hold older records, the first ones first."""
    statement = select(RecordBlock.block).where(RecordBlock.earliest < before)
    return list(session.scalars(statement.order_by(RecordBlock.block)))


def wholly_old_blocks(session: Session, before: datetime) -> set[int]:
    """Blocks that hold none but older records."""
    return set(session.scalars(select(RecordBlock.block).where(RecordBlock.latest < before)))


def id_ranges(blocks: Iterable[int]) -> list[Range]:
    """Ids from, and ids below: neighbouring blocks are one range, up to a size."""
    ranges: list[Range] = []
    for block in blocks:
        low, high = block << BITS, (block + 1) << BITS
        if ranges and ranges[-1][1] == low and high - ranges[-1][0] <= LONGEST_RANGE:
            low = ranges.pop()[0]
        ranges.append((low, high))
    return ranges


def record_ids(
    session: Session, ids: Range, condition: Condition, above: int, count: int
) -> list[int]:
    """The first ids of a range, after ``above``, of records that meet a condition."""
    statement = select(GenerationRecord.id).where(
        GenerationRecord.id > max(above, ids[0] - 1), GenerationRecord.id < ids[1], condition
    )
    return list(session.scalars(statement.order_by(GenerationRecord.id).limit(count)))


def count_records(session: Session, ids: Range, condition: Condition) -> int:
    statement = select(func.count()).select_from(GenerationRecord)
    statement = statement.where(
        GenerationRecord.id >= ids[0], GenerationRecord.id < ids[1], condition
    )
    return session.scalar(statement) or 0


def remove(session: Session, ids: Sequence[int], condition: Condition) -> int:
    """Delete those of the records that still meet the condition."""
    found = held(session, ids, condition)
    return removal.remove_all(session, found)


def remove_texts(session: Session, ids: Sequence[int], condition: Condition, now: datetime) -> int:
    """Take their texts from those of the records that still meet the condition."""
    found = held(session, ids, condition)
    removal.remove_texts(session, found, now)
    return len(found)


def held(session: Session, ids: Sequence[int], condition: Condition) -> list[int]:
    """Which of the records meet the condition; nobody changes them until this transaction ends."""
    statement = select(GenerationRecord.id).where(GenerationRecord.id.in_(ids), condition)
    return list(session.scalars(statement.order_by(GenerationRecord.id).with_for_update()))


def left_over(before: datetime, leaving: Condition | None = None) -> Condition:
    """A conversation that long ago got its last message, and holds none (but leaving ones)."""
    holds = select(GenerationRecord.id).where(GenerationRecord.conversation_id == Conversation.id)
    if leaving is not None:
        holds = holds.where(not_(leaving))
    return and_(Conversation.updated_at < before, ~holds.exists())


def losing_title(of_records: datetime | None, of_texts: datetime | None) -> Condition:
    """A conversation that stays, while that goes of which its title was made, or all its texts.

    To be asked before that has gone.
    """
    ways, stays = [], []
    if of_records is not None:
        old = older(of_records)
        ways.append(and_(Conversation.created_at < of_records, titles.made_of(old)))
        stays.append(not_(left_over(of_records, old)))
    if of_texts is not None:
        old = has_old_text(of_texts, of_records)
        ways.append(and_(Conversation.created_at < of_texts, titles.made_of(old)))
        ways.append(without_texts(of_texts))
    return and_(or_(*ways), *stays)


def without_texts(before: datetime) -> Condition:
    """A conversation of which no text stays, while it still has what was made of them."""
    keeps = select(GenerationRecord.id).where(
        GenerationRecord.conversation_id == Conversation.id,
        GenerationRecord.text_removed_at.is_(None),
        not_(older(before)),
    )
    told = or_(
        Conversation.title != titles.TITLE_OF_NOTHING, Conversation.initial_prompt.is_not(None)
    )
    return and_(Conversation.updated_at < before, told, ~keeps.exists())


def conversation_ids(session: Session, condition: Condition, above: int, count: int) -> list[int]:
    statement = select(Conversation.id).where(Conversation.id > above, condition)
    return list(session.scalars(statement.order_by(Conversation.id).limit(count)))


def count_conversations(session: Session, condition: Condition) -> int:
    return session.scalar(select(func.count()).select_from(Conversation).where(condition)) or 0


def hold_conversations(session: Session, ids: Iterable[int]) -> None:
    """Who is about to say something in one has said it, or waits until this transaction ends.

    A condition on what a conversation holds belongs into a later statement: one that waits for a
    row goes on with what it saw before.
    """
    held = select(Conversation.id).where(Conversation.id.in_(ids)).order_by(Conversation.id)
    session.execute(held.with_for_update())


def remove_conversations(session: Session, ids: Sequence[int], condition: Condition) -> int:
    hold_conversations(session, ids)
    statement = delete(Conversation).where(Conversation.id.in_(ids), condition)
    return records.changed(session, statement.execution_options(synchronize_session=False))


def remove_titles(session: Session, ids: Sequence[int], condition: Condition) -> int:
    """What was made of the texts goes as they did."""
    hold_conversations(session, ids)
    found = list(
        session.scalars(select(Conversation.id).where(Conversation.id.in_(ids), condition))
    )
    titles.remove(session, found)
    return len(found)
