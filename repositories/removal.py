"""Taking records, or their texts, away, with what was made of them.

What was answered from the cache with a text keeps it.
"""

from collections.abc import Collection, Sequence
from datetime import datetime

from sqlalchemy import ColumnElement, and_, bindparam, delete, func, select, update
from sqlalchemy.orm import Session, selectinload

from models import GenerationRecord
from repositories import records, search, titles


def remove(session: Session, owner_id: str, record_id: int) -> bool:
    if records.get(session, owner_id, record_id) is None:
        return False
    return remove_all(session, [record_id]) == 1


def remove_all(session: Session, record_ids: Sequence[int]) -> int:
    """Delete records of whatever owner; answers from the cache that show them keep their texts.

    Titles that were made of them go with them.
    """
    titles.remove_made_of(session, record_ids)
    hand_over(session, record_ids)
    statement = delete(GenerationRecord).where(GenerationRecord.id.in_(record_ids))
    return records.changed(session, statement.execution_options(synchronize_session=False))


def remove_texts(session: Session, record_ids: Sequence[int], now: datetime) -> None:
    """Take their texts from records of whatever owner; the numbers stay."""
    titles.remove_made_of(session, record_ids)
    hand_over(session, record_ids)
    record = GenerationRecord
    found = session.execute(select(record.id, record.parameters).where(record.id.in_(record_ids)))
    rows = [{"of": id, "without": parameters | {"stop": []}} for id, parameters in found]
    statement = (
        update(GenerationRecord)
        .where(GenerationRecord.id == bindparam("of"))
        .values(
            prompt="",
            completion="",
            source_id=None,
            cache_key=None,
            parameters=bindparam("without"),
            text_removed_at=now,
            updated_at=now,
        )
    )
    if rows:
        session.connection().execute(statement, rows)
    search.drop(session, search.RECORDS, record_ids)


def hand_over(session: Session, leaving: Collection[int]) -> None:
    """Before texts are changed or removed: answers from the cache that show them keep them.

    The oldest that stays gets the text for its own, and is the others' source from then on. What
    leaves shows nothing any more. The rows are held first: who is about to show one of their texts
    has done so, or finds it gone.
    """
    session.flush()
    record = GenerationRecord
    records.hold(session, leaving)
    point(session, and_(record.id.in_(leaving), record.source_id.is_not(None)), at=None)
    heirs = heirs_of(session, leaving)
    for heir in heirs:
        source_id = heir.source_id
        detach(heir)
        session.flush()
        point(session, record.source_id == source_id, at=heir.id)
    records.index(session, [heir.id for heir in heirs])


def heirs_of(session: Session, leaving: Collection[int]) -> Sequence[GenerationRecord]:
    """The oldest answer that shows each of the texts, held: one that leaves meanwhile is none."""
    record = GenerationRecord
    showing = record.source_id.in_(leaving)
    oldest = select(func.min(record.id)).where(showing).group_by(record.source_id)
    while True:
        ids = session.scalars(oldest).all()
        held = select(record).where(record.id.in_(ids), showing).order_by(record.id)
        # PostgreSQL holds no row that an outer join may lack.
        heirs = session.scalars(held.options(selectinload(record.source)).with_for_update()).all()
        if len(heirs) == len(ids):
            return heirs


def point(session: Session, which: ColumnElement[bool], at: int | None) -> None:
    """Let answers show another record's text, or none."""
    statement = update(GenerationRecord).where(which).values(source_id=at)
    session.execute(statement.execution_options(synchronize_session=False))


def separate(session: Session, record: GenerationRecord) -> None:
    """Before a text is changed by hand: it is nobody else's, and no answer to anything any more."""
    if record.conversation_id is not None:
        titles.drop_copy(session, record.conversation_id, GenerationRecord.id == record.id)
    detach(record)
    hand_over(session, [record.id])
    record.cache_key = None


def detach(record: GenerationRecord) -> None:
    """Give an answer from the cache a text of its own."""
    record.own_prompt, record.own_completion = record.prompt, record.completion
    record.source = None
