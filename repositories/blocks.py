"""Queries on ``record_blocks``: which ids a time may have.

A block's times are kept in whole ten minutes, so it is written once in ten minutes, not with each
record; between those moments nobody waits for anybody.
"""

from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import bindparam, func, select
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.orm import Session

from lookup import Lookup
from models import HistoryQuery, RecordBlock

BITS = 12  # 4096 ids a block
FIRST_BLOCKS = 8  # mostly hold a page; to read the other blocks' times would take longer
REST = timedelta(minutes=10, microseconds=-1)  # of ten minutes that have begun

KNOWN = Lookup(
    select(RecordBlock.block).where(
        RecordBlock.block == bindparam("block"),
        RecordBlock.earliest <= bindparam("earliest"),
        RecordBlock.latest >= bindparam("latest"),
    )
)


def note(session: Session, created: Iterable[tuple[int, datetime]]) -> None:
    """Let new records be found by their times; in the transaction that inserts them."""
    spans: dict[int, tuple[datetime, datetime]] = {}
    for record_id, moment in created:
        earliest, latest = spans.get(record_id >> BITS, (moment, moment))
        spans[record_id >> BITS] = min(earliest, moment), max(latest, moment)
    for block, (first, last) in spans.items():
        widen(session, block, step_of(first), step_of(last) + REST)


def step_of(moment: datetime) -> datetime:
    return moment.replace(minute=moment.minute // 10 * 10, second=0, microsecond=0)


def widen(session: Session, block: int, earliest: datetime, latest: datetime) -> None:
    values = {"block": block, "earliest": earliest, "latest": latest}
    if KNOWN.row(session, **values) is not None:
        return
    session.execute(upsert(session.get_bind().dialect.name).values(**values))


def upsert(dialect: str) -> Any:
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


def id_ranges(session: Session, query: HistoryQuery) -> Iterator[tuple[int, int | None]]:
    """Where the records that a query wants may be, newest first: ids from, and ids below.

    One range of all ids where the query says nothing of times.
    """
    if query.created_after is None and query.created_before is None:
        yield 0, query.after
        return
    wanted = select(RecordBlock.block).order_by(RecordBlock.block.desc())
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


def neighbours(blocks: Iterable[int], after: int | None) -> list[tuple[int, int]]:
    """Ids from, and ids below, of blocks that follow each other downwards."""
    ranges: list[tuple[int, int]] = []
    for block in blocks:
        low, high = block << BITS, (block + 1) << BITS
        if ranges and ranges[-1][0] == high:
            high = ranges.pop()[1]
        ranges.append((low, high))
    return [(low, high if after is None else min(high, after)) for low, high in ranges]
