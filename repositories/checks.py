"""Queries that look the database over; they change nothing, and see every owner's rows."""

from sqlalchemy import and_, func, inspect, or_, select, text
from sqlalchemy.orm import Session, aliased

from models import TERMINAL, Base, Conversation, GenerationRecord

MOST_NAMED = 10


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


def missing_indexes(session: Session) -> list[str]:
    found = inspect(session.connection())
    return [
        f"index {index.name} is missing"
        for table in Base.metadata.sorted_tables
        for index in table.indexes
        if index.name not in {there["name"] for there in found.get_indexes(table.name)}
    ]


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
