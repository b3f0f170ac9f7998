"""Queries that move whole tables: rows in batches by id, and rows with the ids they had elsewhere.

An owner of None is every owner: these are the operator's.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Select, Table, func, inspect, select, text
from sqlalchemy.orm import Session, aliased

from models import TERMINAL, Base, Conversation, GenerationRecord, HistoryQuery, UsageDelta
from repositories import blocks, records, search, usage
from repositories.bulk import Bound, BulkInsert, insertion_sql, run
from repositories.lists import filtered
from words import title_words

Values = dict[str, Any]
IdRange = tuple[int, int]  # the id before the first, and the last
TEXTS = ("prompt", "completion")
# What belongs to a running process, or means something in one database alone.
LEFT = {"cancel_requested", "flight_key", "cache_key", "idempotency_key", "idempotency_fingerprint"}


def last_id(session: Session, kind: type[Base]) -> int:
    return session.scalar(select(func.max(table_of(kind).c.id))) or 0


def count_records(session: Session) -> int:
    return session.scalar(select(func.count()).select_from(GenerationRecord)) or 0


class Extent(NamedTuple):
    """Of some rows."""

    rows: int
    last: int  # id
    text: int  # characters, or bytes on MySQL


def extent(
    session: Session,
    kind: type[Base],
    owner_id: str | None,
    query: HistoryQuery,
    ids: IdRange,
    count: int,
) -> Extent:
    """Of the first ``count`` wanted rows of a range, by id."""
    id = table_of(kind).c.id
    statement = wanted(kind, select(id, text_size(kind).label("size")), owner_id, query)
    first = statement.where(*between(id, ids)).order_by(id).limit(count).subquery()
    found = select(func.count(), func.max(first.c.id), func.sum(first.c.size))
    rows, last, text = session.execute(found).one()
    return Extent(rows, last or 0, int(text or 0))


def text_size(kind: type[Base]) -> ColumnElement[int]:
    """Of an answer from the cache, that of the text that it shows."""
    if kind is Conversation:
        return func.coalesce(func.length(Conversation.initial_prompt), 0)
    own, source = GenerationRecord.__table__.c, GenerationRecord.__table__.alias("source").c
    shown = select(func.length(source.prompt) + func.length(source.completion))
    return func.coalesce(
        shown.where(source.id == own.source_id).scalar_subquery(),
        func.length(own.prompt) + func.length(own.completion),
    )


def ids_in(
    session: Session, kind: type[Base], owner_id: str | None, query: HistoryQuery, ids: IdRange
) -> Sequence[int]:
    id = table_of(kind).c.id
    statement = wanted(kind, select(id), owner_id, query).where(*between(id, ids))
    return session.scalars(statement.order_by(id)).all()


def records_in(
    session: Session, owner_id: str | None, query: HistoryQuery, ids: IdRange
) -> list[Values]:
    """The wanted records of a range, by id.

    An answer from the cache comes with the text that it shows.
    """
    own, source = GenerationRecord.__table__.c, aliased(GenerationRecord.__table__).c
    texts = [func.coalesce(source[name], own[name]).label(name) for name in TEXTS]
    columns = [column for column in own if column.name not in LEFT.union(TEXTS)]
    statement = wanted(GenerationRecord, select(*columns, *texts), owner_id, query)
    statement = statement.outerjoin(source.id.table, source.id == own.source_id)
    return all_values(session, statement.where(*between(own.id, ids)).order_by(own.id))


def conversations_in(
    session: Session, owner_id: str | None, query: HistoryQuery, ids: IdRange
) -> list[Values]:
    own = Conversation.__table__.c
    statement = wanted(Conversation, select(*own), owner_id, query).where(*between(own.id, ids))
    return all_values(session, statement.order_by(own.id))


def between(id: ColumnElement[int], ids: IdRange) -> tuple[ColumnElement[bool], ...]:
    after, through = ids
    return id > after, id <= through


def wanted(
    kind: type[Base], statement: Select[Any], owner_id: str | None, query: HistoryQuery
) -> Select[Any]:
    """Records that the query wants; where it wants some only, the conversations that hold one.

    Or one that might be one by the time that records are read: its status may change until then.
    """
    if owner_id is not None:
        statement = statement.where(table_of(kind).c.owner_id == owner_id)
    if kind is GenerationRecord:
        return filtered(statement, query)
    if not query.model_dump(exclude={"limit", "order"}, exclude_none=True):
        return statement
    lasting = query.model_copy(update={"status": None})
    held = wanted(GenerationRecord, select(GenerationRecord.id), owner_id, lasting)
    return statement.where(held.where(GenerationRecord.conversation_id == Conversation.id).exists())


def all_values(session: Session, statement: Select[Any]) -> list[Values]:
    """Past the ORM, and by name without looking each name up in each row."""
    found = session.connection().execute(statement)
    names = tuple(found.keys())
    return [dict(zip(names, row, strict=True)) for row in found.all()]


def known(
    session: Session, kind: type[Base], ids: Iterable[int]
) -> dict[int, tuple[str, datetime]]:
    """Owner and creation of those rows that are there: what tells one row from another."""
    table = table_of(kind)
    last = session.scalar(select(func.max(table.c.id))) or 0
    wanted = [id for id in ids if id <= last]
    if not wanted:
        return {}
    found = session.execute(
        select(table.c.id, table.c.owner_id, table.c.created_at).where(table.c.id.in_(wanted))
    )
    return {id: (owner, created) for id, owner, created in found}


def texts(session: Session, ids: Iterable[int]) -> dict[int, tuple[str, str, str]]:
    """Owner, prompt and completion of those records that have a text of their own.

    They are held: what is about to show one of the texts is there before that changes or goes.
    """
    own = GenerationRecord
    statement = (
        select(own.id, own.owner_id, own.own_prompt, own.own_completion)
        .where(own.id.in_(list(ids)), own.source_id.is_(None))
        .order_by(own.id)
        .with_for_update(read=True)
    )
    found = session.execute(statement)
    return {id: (owner, prompt, completion) for id, owner, prompt, completion in found}


class Ready(NamedTuple):
    """A row as its table takes it, and what the index and the sums are to have of it."""

    id: int
    place: blocks.Place | None  # of a record
    row: Bound
    words: str | None
    usage: Bound | None


class Loading:
    """Rows of one kind on their way into one kind of database, with their own ids.

    ``ready`` needs no database and may run in another process; ``add`` only writes.
    """

    def __init__(self, kind: type[Base], drivername: str) -> None:
        table = table_of(kind)
        names = [column.name for column in table.c if column.name not in LEFT]
        self.kind = kind
        self.database_kind = drivername.partition("+")[0]
        self.rows = BulkInsert(table, names, drivername)
        index = search.TITLES if kind is Conversation else search.RECORDS
        indexing = search.insertion(index, self.database_kind)
        index_columns = [search.key_name(index, self.database_kind), "words"]
        self.index_sql = insertion_sql(indexing, drivername, index_columns)
        self.usage = BulkInsert(table_of(UsageDelta), usage.NOTED, drivername)

    def ready(self, row: Values) -> Ready:
        words, noted, place = None, None, None
        if self.kind is Conversation:
            words = title_words(row["title"], row["owner_id"])
        else:
            place = blocks.Place.of(row)
            if row["status"] in TERMINAL:
                words = records.words_of(row)
                noted = self.usage.bind(usage.noted(row))
        words = words and search.stored(words, self.database_kind)
        return Ready(row["id"], place, self.rows.bind(row), words, noted)

    def add(self, session: Session, rows: Sequence[Ready]) -> None:
        """Insert them, let them be found by their words and times, and count them."""
        run(session, self.rows.sql, [row.row for row in rows])
        run(session, self.index_sql, [(row.id, row.words) for row in rows if row.words])
        run(session, self.usage.sql, [row.usage for row in rows if row.usage])
        blocks.note(session, [row.place for row in rows if row.place])


def go_on_after(session: Session, kind: type[Base], last_id: int) -> None:
    """New rows get greater ids from here on.

    The other databases see to it themselves. The lock keeps inserts, which would take ids, out.
    A sequence that was moved stays so: its rows must be about to come in.
    """
    if session.get_bind().dialect.name != "postgresql":
        return
    table = table_of(kind).name
    sequence = session.scalar(text("SELECT pg_get_serial_sequence(:table, 'id')"), {"table": table})
    current = text(f"SELECT last_value FROM {sequence}")  # noqa: S608 - the database named it
    if session.scalar(current) >= last_id:
        return
    session.execute(text(f"LOCK TABLE {table} IN SHARE ROW EXCLUSIVE MODE"))
    session.execute(
        text("SELECT setval(:sequence, :last) WHERE :last > (" + current.text + ")"),
        {"sequence": sequence, "last": last_id},
    )


def drop_tables(session: Session) -> None:
    """All of them, on MySQL; of what failed on PostgreSQL, which takes back tables too, is none."""
    connection = session.connection()
    names = map(connection.dialect.identifier_preparer.quote, inspect(connection).get_table_names())
    if not (tables := ", ".join(names)):
        return
    session.execute(text("SET foreign_key_checks = 0"))
    try:
        session.execute(text(f"DROP TABLE {tables}"))
    finally:
        session.execute(text("SET foreign_key_checks = 1"))


def table_of(kind: type[Base]) -> Table:
    table = kind.__table__
    assert isinstance(table, Table)
    return table
