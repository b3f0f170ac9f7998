"""Queries on ``record_blocks`` and ``model_blocks``: which ids the records of a time, or of a
model, may have.

A block's times are kept in whole ten minutes, so it is written once in ten minutes, not with each
record; between those moments nobody waits for anybody.
"""

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any, NamedTuple, Self

from sqlalchemy import bindparam, func, select
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.orm import Session

from lookup import Lookup
from models import HistoryQuery, ModelBlock, RecordBlock, Status

BITS = 12  # 4096 ids a block
FIRST_BLOCKS = 8  # mostly hold a page; to read the other blocks' times would take longer
REST = timedelta(minutes=10, microseconds=-1)  # of ten minutes that have begun

KNOWN = Lookup(
    select(RecordBlock.block)
    .join(ModelBlock, ModelBlock.block == RecordBlock.block)
    .where(
        RecordBlock.block == bindparam("block"),
        RecordBlock.earliest <= bindparam("earliest"),
        RecordBlock.latest >= bindparam("latest"),
        ModelBlock.owner_id == bindparam("owner_id"),
        ModelBlock.model_name == bindparam("model_name"),
    )
)


class Place(NamedTuple):
    """What a record is found by."""

    id: int
    created_at: datetime
    owner_id: str
    model_name: str

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        return cls(*[row[name] for name in cls._fields])


def note(session: Session, places: Iterable[Place]) -> None:
    """Let new records be found by their times and models; in the transaction that inserts them."""
    spans: dict[tuple[int, str, str], tuple[datetime, datetime]] = {}
    for record_id, moment, owner_id, model_name in places:
        key = record_id >> BITS, owner_id, model_name
        earliest, latest = spans.get(key, (moment, moment))
        spans[key] = min(earliest, moment), max(latest, moment)
    for key in sorted(spans):  # in one order: who writes two blocks waits for nobody who waits
        first, last = spans[key]
        widen(session, *key, step_of(first), step_of(last) + REST)


def step_of(moment: datetime) -> datetime:
    return moment.replace(minute=moment.minute // 10 * 10, second=0, microsecond=0)


def widen(
    session: Session,
    block: int,
    owner_id: str,
    model_name: str,
    earliest: datetime,
    latest: datetime,
) -> None:
    times = {"block": block, "earliest": earliest, "latest": latest}
    models = {"block": block, "owner_id": owner_id, "model_name": model_name}
    if KNOWN.row(session, **(times | models)) is not None:
        return
    dialect = session.get_bind().dialect.name
    session.execute(wider(dialect).values(**times))
    session.execute(at_most_once(dialect).values(**models))


def wider(dialect: str) -> Any:
    """Insert a block, or make it wider."""
    if dialect in ("mysql", "mariadb"):
        statement = mysql.insert(RecordBlock)
        return statement.on_duplicate_key_update(
            earliest=func.least(RecordBlock.earliest, statement.inserted.earliest),
            latest=func.greatest(RecordBlock.latest, statement.inserted.latest),
        )
    sqlite_kind = dialect == "sqlite"
    least, greatest = (func.min, func.max) if sqlite_kind else (func.least, func.greatest)
    insert: Any = sqlite.insert if sqlite_kind else postgresql.insert
    statement = insert(RecordBlock)
    return statement.on_conflict_do_update(
        index_elements=["block"],
        set_={
            "earliest": least(RecordBlock.earliest, statement.excluded.earliest),
            "latest": greatest(RecordBlock.latest, statement.excluded.latest),
        },
    )


def at_most_once(dialect: str) -> Any:
    """Insert a model's block, unless it is there."""
    if dialect in ("mysql", "mariadb"):
        return mysql.insert(ModelBlock).on_duplicate_key_update(block=ModelBlock.block)
    insert: Any = sqlite.insert if dialect == "sqlite" else postgresql.insert
    return insert(ModelBlock).on_conflict_do_nothing()


def id_ranges(
    session: Session, owner_id: str, query: HistoryQuery
) -> Iterator[tuple[int, int | None]]:
    """Where the records that a query wants may be, newest first: ids from, and ids below.

    One range of all ids where the query says nothing that blocks can tell.
    """
    by_model = is_found_by_model(query)
    if not by_model and query.created_after is None and query.created_before is None:
        yield 0, query.after
        return
    wanted = select(RecordBlock.block).order_by(RecordBlock.block.desc())
    if by_model:
        wanted = wanted.join(ModelBlock, ModelBlock.block == RecordBlock.block).where(
            ModelBlock.owner_id == owner_id, ModelBlock.model_name == query.model_name
        )
    if query.created_after is not None:
        wanted = wanted.where(RecordBlock.latest > query.created_after)
    if query.created_before is not None:
        wanted = wanted.where(RecordBlock.earliest < query.created_before)
    if query.after is not None:
        wanted = wanted.where(RecordBlock.block <= query.after >> BITS)
    blocks = session.scalars(wanted.limit(FIRST_BLOCKS)).all()
    yield from neighbours(blocks, query.after)
    if len(blocks) == FIRST_BLOCKS:
        others = session.scalars(wanted.where(RecordBlock.block < blocks[-1])).all()
        yield from neighbours(others, query.after)


def is_found_by_model(query: HistoryQuery) -> bool:
    """Whether nothing else that is asked for has an index of its own, which is smaller."""
    has_index = query.q is not None or query.user_id is not None
    return (
        query.model_name is not None and not has_index and query.status in (None, Status.COMPLETED)
    )


def neighbours(blocks: Iterable[int], after: int | None) -> list[tuple[int, int]]:
    """Ids from, and ids below, of blocks that follow each other downwards."""
    ranges: list[tuple[int, int]] = []
    for block in blocks:
        low, high = block << BITS, (block + 1) << BITS
        if ranges and ranges[-1][0] == high:
            high = ranges.pop()[1]
        ranges.append((low, high))
    return [(low, high if after is None else min(high, after)) for low, high in ranges]
