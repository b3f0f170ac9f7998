"""Queries on ``generation_records``."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from functools import cache
from inspect import signature
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import Update, bindparam, select, update
from sqlalchemy.orm import Session

from lookup import Lookup
from models import TERMINAL, FinishReason, GenerationRecord, Record, Status
from repositories import blocks, search, usage
from words import record_words

WORDS_OF = tuple(signature(record_words).parameters)  # the columns

CLOSED = {"lease_id": None, "flight_key": None, "cancel_requested": None}

# Built once: most of a read's time would go into building it.
ONE = select(GenerationRecord).where(
    GenerationRecord.id == bindparam("record_id"),
    GenerationRecord.owner_id == bindparam("owner_id"),
)
Answered = TypeVar("Answered", bound=Record)
TABLE = GenerationRecord.__table__
SOURCE = TABLE.alias("source")
VIEW = select(  # of records as they are answered, without the costs of objects of the ORM
    *(TABLE.c[name] for name in Record.model_fields if name in TABLE.c),
    TABLE.c.completion,
    TABLE.c.source_id,
    SOURCE.c.prompt.label("source_prompt"),
    SOURCE.c.completion.label("source_completion"),
).select_from(TABLE.outerjoin(SOURCE, SOURCE.c.id == TABLE.c.source_id))
VIEWED = tuple(VIEW.selected_columns.keys())
SHOWN = Lookup(
    VIEW.where(TABLE.c.id == bindparam("record_id"), TABLE.c.owner_id == bindparam("owner_id"))
)
ROWS = select(TABLE).where(TABLE.c.id.in_(bindparam("ids", expanding=True)))
IN_PROGRESS = (
    select(TABLE)
    .where(
        GenerationRecord.id.in_(bindparam("ids", expanding=True)),
        GenerationRecord.status == Status.IN_PROGRESS,
    )
    .order_by(GenerationRecord.id)
    .with_for_update()
)

WANTED = select(TABLE.c.id, TABLE.c.attempts).where(
    TABLE.c.id.in_(bindparam("ids", expanding=True)),
    TABLE.c.status == Status.IN_PROGRESS,
    TABLE.c.cancel_requested.is_not(True),
)


def add(session: Session, owner_id: str, **values: Any) -> GenerationRecord:
    """Insert a record, in progress unless ``values`` say otherwise; it has its id on return."""
    record = GenerationRecord(owner_id=owner_id, **({"status": Status.IN_PROGRESS} | values))
    add_all(session, [record])
    if record.status in TERMINAL:
        keep_account(session, rows_of(session, [record.id]))
    return record


def add_all(session: Session, found: Sequence[GenerationRecord]) -> None:
    """Insert records in progress; they have their ids on return."""
    session.add_all(found)
    session.flush()
    blocks.note(session, [place_of(record) for record in found])


def place_of(record: GenerationRecord) -> blocks.Place:
    return blocks.Place(record.id, record.created_at, record.owner_id, record.model_name)


class RecordEnd(NamedTuple):
    """What a record's end writes into its row, while that is at the same attempt."""

    owner_id: str
    record_id: int
    values: Mapping[str, Any]
    attempt: int = 1


def finish(session: Session, owner_id: str, record_id: int, **values: Any) -> bool:
    """Write the end of a record's first attempt, once: False when it is no longer in progress."""
    return finish_all(session, [RecordEnd(owner_id, record_id, values)])[0]


def finish_all(session: Session, ends: Sequence[RecordEnd]) -> list[bool]:
    """Write records' ends, each once: False for those whose attempt is no longer in progress.

    All write the same columns. The attempt tells a process that was stopped for a while, and whose
    record was closed and begun again elsewhere, that the row is not its own any more.
    """
    rows = session.connection().execute(IN_PROGRESS, {"ids": [end.record_id for end in ends]})
    found = {(row["owner_id"], row["id"], row["attempts"]): row for row in rows.mappings()}
    ended = [(end, found.pop((end.owner_id, end.record_id, end.attempt), None)) for end in ends]
    written = [
        {"record": row["id"]} | {f"new_{name}": value for name, value in end.values.items()}
        for end, row in ended
        if row is not None
    ]
    if written:
        session.connection().execute(ending_with(*ends[0].values), written)
        keep_account(session, [{**row, **end.values} for end, row in ended if row is not None])
    return [row is not None for _, row in ended]


@cache
def ending_with(*names: str) -> Update:
    """Built once: building it for each record takes ten times as long as running it."""
    return (
        update(GenerationRecord)
        .where(
            GenerationRecord.id == bindparam("record"),
            GenerationRecord.status == Status.IN_PROGRESS,
        )
        .values(**CLOSED, **{name: bindparam(f"new_{name}") for name in names})
    )


def keep_account(session: Session, rows: Sequence[Mapping[str, Any]]) -> None:
    """Records have ended: let them be found by their words, and count them."""
    search.put(session, search.RECORDS, searchable(rows))
    usage.note(session, rows)


def index(session: Session, record_ids: Sequence[int]) -> None:
    """Let records be found by their words."""
    search.put(session, search.RECORDS, searchable(rows_of(session, record_ids)))


def rows_of(session: Session, record_ids: Sequence[int]) -> list[Mapping[str, Any]]:
    found = session.execute(ROWS, {"ids": record_ids})
    return [dict(row) for row in found.mappings()]


def searchable(rows: Iterable[Mapping[str, Any]]) -> list[tuple[int, str]]:
    """What the search index holds of records; of those without a text, nothing."""
    return [(row["id"], words) for row in rows if (words := words_of(row)) is not None]


def words_of(row: Mapping[str, Any]) -> str | None:
    if not (row["prompt"] or row["completion"]):
        return None
    return record_words(*[row[name] for name in WORDS_OF])


def index_again(session: Session, record_ids: Sequence[int]) -> None:
    """After texts have changed. The change must have been flushed."""
    search.drop(session, search.RECORDS, record_ids)
    index(session, record_ids)


class Grown(NamedTuple):
    """How far a running text has come."""

    record_id: int
    text: str
    tokens: int
    attempt: int = 1


def checkpoint(session: Session, texts: Sequence[Grown]) -> None:
    """Store how far running texts of whatever owner have come, where the attempt still runs."""
    statement = (
        update(GenerationRecord)
        .where(
            GenerationRecord.id == bindparam("record"),
            GenerationRecord.attempts == bindparam("attempt"),
            GenerationRecord.status == Status.IN_PROGRESS,
        )
        .values(completion=bindparam("text"), completion_tokens=bindparam("tokens"))
    )
    rows = [
        {"record": record_id, "attempt": attempt, "text": text, "tokens": tokens}
        for record_id, text, tokens, attempt in sorted(texts)
    ]
    session.connection().execute(statement, rows)


def request_cancel(session: Session, owner_id: str, record_id: int) -> None:
    """Ask whichever process runs the record to cancel it."""
    session.execute(
        update(GenerationRecord)
        .where(
            GenerationRecord.id == record_id,
            GenerationRecord.owner_id == owner_id,
            GenerationRecord.status == Status.IN_PROGRESS,
        )
        .values(cancel_requested=True)
        .execution_options(synchronize_session=False)
    )


def wanted(session: Session, record_ids: Sequence[int]) -> set[tuple[int, int]]:
    """Which records of whatever owner are to go on, each with its attempt: they are in progress,
    and nobody asked to cancel them."""
    found = session.execute(WANTED, {"ids": record_ids})
    return {(record_id, attempt) for record_id, attempt in found}


def get(session: Session, owner_id: str, record_id: int) -> GenerationRecord | None:
    return session.scalar(ONE, {"record_id": record_id, "owner_id": owner_id})


def hold(session: Session, record_ids: Collection[int]) -> None:
    """Nobody else changes records of whatever owner until the transaction ends."""
    held = select(GenerationRecord.id).where(GenerationRecord.id.in_(record_ids))
    session.execute(held.order_by(GenerationRecord.id).with_for_update())


def as_answered(row: Sequence[Any], shape: type[Answered]) -> Answered:
    """A record, or more than that, from a row of ``VIEW``."""
    record = dict(zip(VIEWED, row, strict=True))
    if record["source_id"] is not None:
        record |= {"prompt": record["source_prompt"], "completion": record["source_completion"]}
    record["generated_text"] = record["prompt"] + record["completion"]
    record["total_tokens"] = record["prompt_tokens"] + record["completion_tokens"]
    record["cached"] = record["source_id"] is not None
    return shape.model_validate(record)


def find(session: Session, owner_id: str | None, record_id: int) -> GenerationRecord | None:
    """The operator's look at a record, of whatever owner where none is named."""
    if owner_id is not None:
        return get(session, owner_id, record_id)
    return session.get(GenerationRecord, record_id)


def reopen(session: Session, record: GenerationRecord, **values: Any) -> bool:
    """Put a record that was cut short in progress again; False when somebody else did."""
    statement = (
        update(GenerationRecord)
        .where(
            GenerationRecord.id == record.id,
            GenerationRecord.owner_id == record.owner_id,
            GenerationRecord.attempts == record.attempts,
            GenerationRecord.status == record.status,
        )
        .values(
            status=Status.IN_PROGRESS,
            finish_reason=None,
            attempts=GenerationRecord.attempts + 1,
            duration_ms=None,
            **values,
        )
        .execution_options(synchronize_session=False)
    )
    if changed(session, statement) != 1:
        return False
    search.drop(session, search.RECORDS, [record.id])
    model_name = values.get("model_name", record.model_name)
    blocks.note(session, [place_of(record)._replace(model_name=model_name)])
    return True


def pin(session: Session, owner_id: str, record_id: int, pinned: bool, now: datetime) -> None:
    """Keep a record however old it is, or no longer."""
    session.execute(
        update(GenerationRecord)
        .where(
            GenerationRecord.id == record_id,
            GenerationRecord.owner_id == owner_id,
            GenerationRecord.pinned.is_(not pinned),
        )
        .values(pinned=pinned, updated_at=now)
        .execution_options(synchronize_session=False)
    )


def open_leases(session: Session) -> set[int]:
    """Leases that hold records of whatever owner in progress."""
    column = GenerationRecord.lease_id
    return {
        lease
        for lease in session.scalars(select(column).where(column.is_not(None)).distinct())
        if lease is not None
    }


def open_of(session: Session, lease_id: int) -> set[int]:
    """Records of whatever owner that a process has in progress."""
    return set(
        session.scalars(select(GenerationRecord.id).where(GenerationRecord.lease_id == lease_id))
    )


def interrupt(session: Session, lease_ids: Sequence[int], record_ids: Sequence[int] = ()) -> int:
    """Close what dead processes left in progress, of whatever owner; how many there were."""
    is_theirs = (
        GenerationRecord.lease_id.in_(lease_ids) | GenerationRecord.id.in_(record_ids),
        GenerationRecord.status == Status.IN_PROGRESS,
    )
    # In the order in which others hold them: one that was taken for dead may be ending some.
    held = select(GenerationRecord.id).where(*is_theirs).order_by(GenerationRecord.id)
    ids = list(session.scalars(held.with_for_update()))
    statement = (
        update(GenerationRecord)
        .where(GenerationRecord.id.in_(ids))
        .values(status=Status.INCOMPLETE, finish_reason=FinishReason.INTERRUPTED, **CLOSED)
        .execution_options(synchronize_session=False)
    )
    session.execute(statement)
    keep_account(session, rows_of(session, ids))
    return len(ids)


def changed(session: Session, statement: Any) -> int:
    return int(session.execute(statement).rowcount)  # type: ignore[attr-defined]
