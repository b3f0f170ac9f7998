"""Queries that look the database over; they change nothing, and see every owner's rows."""

from collections.abc import Iterator
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Inspector,
    Integer,
    Select,
    Table,
    and_,
    column,
    func,
    insert,
    inspect,
    literal,
    or_,
    select,
    table,
    text,
    true,
)
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.orm import Mapped, Session, aliased

from models import TERMINAL, Base, Conversation, GenerationRecord, ModelBlock, RecordBlock
from repositories import search, usage
from repositories.blocks import BITS

MOST_NAMED = 10
READ_AT_ONCE = 100
SEARCHED = (search.RECORDS, search.TITLES)


def key_of(one: Table) -> ColumnElement[int]:
    return one.primary_key.columns[0]


def numbered() -> list[Table]:
    """Tables whose rows have numbers for names; the others' names may be a person's."""
    tables = Base.metadata.sorted_tables
    return [one for one in tables if isinstance(key_of(one).type, BigInteger)]


def damage(session: Session) -> list[str]:
    """What the database itself finds wrong with what it keeps."""
    dialect = session.get_bind().dialect.name
    if dialect == "sqlite":
        found = session.scalars(text(f"PRAGMA integrity_check({MOST_NAMED})")).all()
        return [line for line in found if line != "ok"]
    if dialect == "postgresql":
        invalid = text("SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid")
        return [f"index {name} is not valid" for name in session.scalars(invalid)]
    tables = ", ".join(Base.metadata.tables)
    rows = session.execute(text(f"CHECK TABLE {tables}")).all()
    return [f"{table}: {said}" for table, _, kind, said in rows if kind == "error" or said != "OK"]


def search_damage(session: Session) -> list[str]:
    """What SQLite finds wrong with the search index; nobody else writes meanwhile."""
    if session.get_bind().dialect.name != "sqlite":
        return []
    lines = []
    for index in SEARCHED:
        check = insert(table(index.name, column(index.name))).values(
            {index.name: "integrity-check"}
        )
        try:
            session.execute(check)
        except DBAPIError:
            lines.append(f"{index.name} is damaged")
    return lines


def missing_parts(session: Session) -> list[str]:
    """Tables, indexes and triggers that are not there, or not as they should be."""
    found = inspect(session.connection())
    tables = {*Base.metadata.tables, *(index.name for index in SEARCHED)}
    there = set(found.get_table_names())
    lines = [f"table {name} is missing" for name in sorted(tables - there)]
    for one in Base.metadata.sorted_tables:
        if one.name in there:
            lines += missing_indexes(found, one)
    return lines + missing_triggers(session)


def missing_indexes(found: Inspector, one: Table) -> Iterator[str]:
    unique = {index["name"]: bool(index["unique"]) for index in found.get_indexes(one.name)}
    for index in one.indexes:
        if index.name not in unique:
            yield f"index {index.name} is missing"
        elif index.unique and not unique[index.name]:
            yield f"index {index.name} lets the same value in twice"


def missing_triggers(session: Session) -> list[str]:
    """Those that keep a SQLite file's search index."""
    if session.get_bind().dialect.name != "sqlite":
        return []
    names = text("SELECT name FROM sqlite_master WHERE type = 'trigger'")
    there = set(session.scalars(names))
    wanted = [f"{index.name}_{moment}" for index in SEARCHED for moment in ("changed", "deleted")]
    return [f"trigger {name} is missing" for name in wanted if name not in there]


def unreadable(session: Session, one: Table, after: int) -> tuple[list[int], int | None]:
    """Ids of rows whose columns cannot be read, of the next some; the last id that was looked at.

    The messages of such errors hold what was read: they are for nobody.
    """
    key = key_of(one)
    ids = session.scalars(select(key).where(key > after).order_by(key).limit(READ_AT_ONCE)).all()
    if not ids or is_readable(session, select(*one.c).where(key > after, key <= ids[-1])):
        return [], ids[-1] if ids else None
    broken = [id for id in ids if not is_readable(session, select(*one.c).where(key == id))]
    return broken, ids[-1]


def is_readable(session: Session, statement: Select[Any]) -> bool:
    try:
        session.execute(statement).all()
    except (SQLAlchemyError, ValueError, TypeError, LookupError, ArithmeticError):
        return False
    return True


def orphans(session: Session) -> int:
    """Records whose conversation is not there, or is another owner's."""
    lost = or_(Conversation.id.is_(None), Conversation.owner_id != GenerationRecord.owner_id)
    statement = (
        select(func.count())
        .select_from(GenerationRecord)
        .outerjoin(Conversation, GenerationRecord.conversation_id == Conversation.id)
        .where(GenerationRecord.conversation_id.is_not(None), lost)
    )
    return session.scalar(statement) or 0


def sourceless(session: Session) -> int:
    """Answers from the cache whose source is not there, another owner's, or has no own text."""
    source = aliased(GenerationRecord)
    lost = or_(
        source.id.is_(None),
        source.owner_id != GenerationRecord.owner_id,
        source.source_id.is_not(None),
    )
    statement = (
        select(func.count())
        .select_from(GenerationRecord)
        .outerjoin(source, GenerationRecord.source_id == source.id)
        .where(GenerationRecord.source_id.is_not(None), lost)
    )
    return session.scalar(statement) or 0


def open_records(session: Session) -> dict[int, int]:
    """How many records each lease holds in progress."""
    lease = GenerationRecord.lease_id
    found = session.execute(
        select(lease, func.count()).where(lease.is_not(None)).group_by(lease)
    ).all()
    return {held: count for held, count in found if held is not None}


def misplaced(session: Session) -> int:
    """Records in progress that nobody holds, or held ones that have ended."""
    ended = GenerationRecord.status.in_(sorted(TERMINAL))
    held = GenerationRecord.lease_id.is_not(None)
    statement = select(func.count()).where(or_(and_(ended, held), and_(~ended, ~held)))
    return session.scalar(statement.select_from(GenerationRecord)) or 0


def unfound_by_time(session: Session) -> int:
    """Records that were created outside of what is known of their block's times."""
    block, created = RecordBlock, GenerationRecord.created_at
    outside = or_(block.block.is_(None), created < block.earliest, created > block.latest)
    statement = (
        select(func.count())
        .select_from(GenerationRecord)
        .outerjoin(block, block.block == block_of_record())
        .where(outside)
    )
    return session.scalar(statement) or 0


def unfound_by_model(session: Session) -> int:
    """Records of a model that their block is not known to have records of."""
    known = select(ModelBlock.block).where(
        ModelBlock.owner_id == GenerationRecord.owner_id,
        ModelBlock.model_name == GenerationRecord.model_name,
        ModelBlock.block == block_of_record(),
    )
    return session.scalar(select(func.count(GenerationRecord.id)).where(~known.exists())) or 0


def block_of_record() -> ColumnElement[int]:
    return GenerationRecord.id.bitwise_rshift(literal(BITS, Integer))


def unfound_by_words(session: Session) -> dict[str, int]:
    """How many records that have ended with a text, and conversations, are in no search index."""
    record = GenerationRecord
    has_text = or_(record.own_prompt != "", record.own_completion != "")
    ended = and_(record.status.in_(sorted(TERMINAL)), has_text)
    return {
        "records": not_indexed(session, search.RECORDS, record.id, ended),
        "conversations": not_indexed(session, search.TITLES, Conversation.id, true()),
    }


def not_indexed(
    session: Session, index: search.Index, id: Mapped[int], condition: ColumnElement[bool]
) -> int:
    sqlite = session.get_bind().dialect.name == "sqlite"
    name, key = (f"{index.name}_docsize", "id") if sqlite else (index.name, index.key)
    rows = table(name, column(key, BigInteger))
    there = select(rows.c[key]).where(rows.c[key] == id)
    return session.scalar(select(func.count(id)).where(condition, ~there.exists())) or 0


def can_add_up(session: Session) -> bool:
    """Whether there is the row that whoever adds to the sums holds."""
    return session.scalar(usage.TURN) is not None
