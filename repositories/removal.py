"""Taking records, or their texts, away: what was answered from the cache with them keeps them."""

from collections.abc import Sequence, Set
from datetime import datetime

from sqlalchemy import bindparam, delete, select, update
from sqlalchemy.orm import Session

from models import GenerationRecord
from repositories import records, search


def remove(session: Session, owner_id: str, record_id: int) -> bool:
    if records.get(session, owner_id, record_id) is None:
        return False
    return remove_all(session, [record_id]) == 1


def remove_all(session: Session, record_ids: Sequence[int]) -> int:
    """Delete records of whatever owner; answers from the cache that show them keep their texts."""
    hand_over(session, set(record_ids))
    statement = delete(GenerationRecord).where(GenerationRecord.id.in_(record_ids))
    return records.changed(session, statement.execution_options(synchronize_session=False))


def remove_texts(session: Session, record_ids: Sequence[int], now: datetime) -> None:
    """Take their texts from records of whatever owner; the numbers stay."""
    hand_over(session, set(record_ids))
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


def hand_over(session: Session, leaving: Set[int]) -> None:
    """Before texts are changed or removed: answers from the cache that show them keep them.

    The oldest that stays gets the text for its own, and is the others' source from then on. The
    rows are held first: who is about to show one of their texts has done so, or finds it gone.
    """
    held = select(GenerationRecord.id).where(GenerationRecord.id.in_(leaving))
    session.execute(held.order_by(GenerationRecord.id).with_for_update())
    column = GenerationRecord.source_id
    dependents = list(
        session.scalars(
            select(GenerationRecord).where(column.in_(leaving)).order_by(GenerationRecord.id)
        )
    )
    heirs: dict[int | None, GenerationRecord] = {}
    for record in dependents:
        source_id = record.source_id
        if record.id in leaving:
            record.source = None
        elif source_id in heirs:
            record.source = heirs[source_id]
        else:
            detach(record)
            heirs[source_id] = record
    session.flush()
    records.index(session, [heir.id for heir in heirs.values()])


def separate(session: Session, record: GenerationRecord) -> None:
    """Before a text is changed by hand: it is nobody else's, and no answer to anything any more."""
    hand_over(session, {record.id})
    detach(record)
    record.cache_key = None


def detach(record: GenerationRecord) -> None:
    """Give an answer from the cache a text of its own."""
    record.own_prompt, record.own_completion = record.prompt, record.completion
    record.source = None
