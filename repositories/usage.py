"""Queries on ``usage`` and ``usage_deltas``: what happened, counted.

A request is noted where it ends, in the transaction that ends it, as a row of its own: nobody
waits for a sum that others write as well. ``fold`` adds such rows to the sums in one transaction.
``between`` reads both in one statement, so what is noted counts at once, and once.
"""

import struct
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Row,
    bindparam,
    delete,
    func,
    insert,
    literal,
    literal_column,
    null,
    select,
    union_all,
    update,
)
from sqlalchemy.orm import Session

from models import Status, Usage, UsageDelta, UsageKind

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
FAILURES = (Status.FAILED, Status.INCOMPLETE)
COUNTED = (
    "requests",
    "failures",
    "cancelled",
    "cached",
    "prompt_tokens",
    "completion_tokens",
)
NOTED = ("owner_id", "user_id", "model_name", "created_at", *COUNTED, "duration_ms")
# A literal: as a parameter, PostgreSQL would not know it again where rows are grouped.
NOTED_USER = func.coalesce(UsageDelta.user_id, literal_column("''"))
NARROW, NARROW_MARK = 1 << 16, b"\0"
MOST_NAMED = 400  # hours, in one statement
NOTE = insert(UsageDelta)


class Key(NamedTuple):
    """Which sum."""

    owner_id: str
    kind: str
    hour: int
    name: str


OLDEST = select(UsageDelta.__table__).order_by(UsageDelta.id)
TAKE_OUT = delete(UsageDelta).where(UsageDelta.id.in_(bindparam("ids", expanding=True)))
KEPT_SUMS = select(Usage.__table__).where(
    Usage.owner_id == bindparam("owner_id"),
    Usage.kind == bindparam("kind"),
    Usage.hour == bindparam("hour"),
    Usage.name.in_(bindparam("names", expanding=True)),
)
ADD_SUM = insert(Usage)
CHANGE_SUM = update(Usage).where(
    *[getattr(Usage, name) == bindparam(f"of_{name}") for name in Key._fields]
)
# Its whole key: by the kind alone all sums would be read, which are by owner.
TURN = select(Usage.kind).where(
    Usage.owner_id == "", Usage.kind == UsageKind.LOCK, Usage.hour == 0, Usage.name == ""
)


class Sums:
    """What is counted of some requests, and how long they took."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(COUNTED, 0)
        self.latencies: list[int] = []  # milliseconds, of single requests
        self.packed: list[bytes] = []  # of sums

    def add(self, row: Any, latencies: bytes | None = None) -> None:
        """A sum, or one request's."""
        for name in COUNTED:
            self.counts[name] += getattr(row, name)
        if latencies is not None:
            self.packed.append(latencies)
        elif row.duration_ms is not None:
            self.latencies.append(row.duration_ms)

    def distribution(self) -> tuple[Sequence[int], Sequence[int]]:
        """Milliseconds in their order, and how many took so long."""
        if len(self.packed) == 1 and not self.latencies:
            return unpacked(self.packed[0])
        merged = Counter(self.latencies)
        for content in self.packed:
            for value, count in zip(*unpacked(content), strict=True):
                merged[value] += count
        values = sorted(merged)
        return values, [merged[value] for value in values]


def packed(sums: Sums) -> bytes:
    """The values in order, then how often each was seen: 32 bits each, or 16 after a zero byte."""
    numbers = [number for part in sums.distribution() for number in part]
    if max(numbers, default=0) < NARROW:
        return NARROW_MARK + struct.pack(f"<{len(numbers)}H", *numbers)
    return struct.pack(f"<{len(numbers)}I", *numbers)


def unpacked(content: bytes) -> tuple[Sequence[int], Sequence[int]]:
    narrow = len(content) % 2 == 1
    numbers = array("H", content[1:]) if narrow else array("I", content)
    if sys.byteorder == "big":
        numbers.byteswap()
    half = len(numbers) // 2
    return numbers[:half], numbers[half:]


def note(session: Session, ended: Iterable[Mapping[str, Any]]) -> None:
    """Count records that have just ended."""
    if rows := [noted(row) for row in ended]:
        session.connection().execute(NOTE, rows)


def noted(row: Mapping[str, Any]) -> dict[str, Any]:
    """What is counted of a record."""
    return {
        "owner_id": row["owner_id"],
        "user_id": row["user_id"],
        "model_name": row["model_name"],
        "created_at": row["created_at"],
        "requests": 1,
        "failures": int(row["status"] in FAILURES),
        "cancelled": int(row["status"] == Status.CANCELLED),
        "cached": int(row["source_id"] is not None),
        "prompt_tokens": row["prompt_tokens"],
        "completion_tokens": row["completion_tokens"],
        "duration_ms": row["duration_ms"],
    }


def fold(session: Session, count: int) -> int:
    """Add at most ``count`` of what was noted to the sums; how much that was.

    One process at a time: nothing happens while another does so.
    """
    if session.scalar(TURN.with_for_update(skip_locked=True)) is None:
        return 0
    deltas = session.execute(OLDEST.limit(count)).all()
    sums: dict[Key, Sums] = {}
    for delta in deltas:
        for key in keys_of(delta):
            sums.setdefault(key, Sums()).add(delta)
    add_to_sums(session, sums)
    session.connection().execute(TAKE_OUT, {"ids": [delta.id for delta in deltas]})
    return len(deltas)


def is_noted(session: Session) -> bool:
    """Whether there is something to add."""
    return session.scalar(select(UsageDelta.id).limit(1)) is not None


def hour_of(moment: datetime) -> int:
    """Whole hours since 1970."""
    return (moment - EPOCH) // timedelta(hours=1)


def keys_of(delta: Any) -> list[Key]:
    hour = hour_of(delta.created_at)
    day = hour // 24 * 24
    return [
        Key(delta.owner_id, UsageKind.MODEL_HOUR, hour, delta.model_name),
        Key(delta.owner_id, UsageKind.MODEL_DAY, day, delta.model_name),
        Key(delta.owner_id, UsageKind.USER_DAY, day, delta.user_id or ""),
    ]


def add_to_sums(session: Session, added: Mapping[Key, Sums]) -> None:
    """What is new in one statement, what was there in another, however much is added."""
    known = kept(session, added)
    new: list[Any] = []
    changed: list[Any] = []
    for key, sums in added.items():
        if key in known:
            sums.add(known[key], known[key].latencies)
        values = sums.counts | {"latencies": packed(sums)}
        if key in known:
            changed.append({f"of_{name}": part for name, part in key._asdict().items()} | values)
        else:
            new.append(key._asdict() | values)
    for statement, rows in ((ADD_SUM, new), (CHANGE_SUM, changed)):
        if rows:
            session.connection().execute(statement, rows)


def kept(session: Session, keys: Iterable[Key]) -> dict[Key, Row[Any]]:
    """Those sums that are there."""
    names: dict[tuple[str, str, int], list[str]] = {}
    for owner_id, kind, hour, name in keys:
        names.setdefault((owner_id, kind, hour), []).append(name)
    found: dict[Key, Row[Any]] = {}
    for (owner_id, kind, hour), some in names.items():
        asked = {"owner_id": owner_id, "kind": kind, "hour": hour, "names": some}
        for row in session.execute(KEPT_SUMS, asked):
            found[Key(owner_id, kind, hour, row.name)] = row
    return found


def between(
    session: Session,
    owner_id: str,
    kind: UsageKind,
    first: datetime,
    last: datetime,
    names: Sequence[str] | None = None,
) -> Sequence[Row[Any]]:
    """Sums and single requests with first <= their time < last, of all names or of some."""
    name = NOTED_USER if kind is UsageKind.USER_DAY else UsageDelta.model_name
    sums = select(
        Usage.hour.label("hour"),
        literal(None, UsageDelta.created_at.type).label("created_at"),
        Usage.name.label("name"),
        *(getattr(Usage, column).label(column) for column in COUNTED),
        Usage.latencies.label("latencies"),
        literal(None, UsageDelta.duration_ms.type).label("duration_ms"),
    ).where(Usage.owner_id == owner_id, Usage.kind == kind)
    single = select(
        null(),
        UsageDelta.created_at,
        name,
        *(getattr(UsageDelta, column) for column in COUNTED),
        null(),
        UsageDelta.duration_ms,
    ).where(*are_noted(owner_id, first, last))
    if names is None:
        sums = sums.where(Usage.hour >= hour_of(first), Usage.hour < hour_of(last))
    else:  # each looked up: between two hours are the sums of many others
        hours = days(session, owner_id, kind, first, last)
        sums = sums.where(of_hours(hours), Usage.name.in_(names))
        single = single.where(name.in_(names))
    return session.execute(union_all(sums, single)).all()


def noted_of_users(
    session: Session, owner_id: str, first: datetime, last: datetime
) -> dict[str, int]:
    """How many requests of each user are not in the sums yet."""
    noted = select(NOTED_USER, func.sum(UsageDelta.requests)).group_by(NOTED_USER)
    found = session.execute(noted.where(*are_noted(owner_id, first, last)))
    return {name: int(requests) for name, requests in found}


def are_noted(owner_id: str, first: datetime, last: datetime) -> tuple[ColumnElement[bool], ...]:
    return (
        UsageDelta.owner_id == owner_id,
        UsageDelta.created_at >= first,
        UsageDelta.created_at < last,
    )


def days(
    session: Session, owner_id: str, kind: UsageKind, first: datetime, last: datetime
) -> Sequence[int]:
    """The first hours of the days between two times, from the first that has a sum to the last."""
    theirs = (
        Usage.owner_id == owner_id,
        Usage.kind == kind,
        Usage.hour >= hour_of(first),
        Usage.hour < hour_of(last),
    )
    ends = [select(end(Usage.hour)).where(*theirs) for end in (func.min, func.max)]
    earliest, latest = map(session.scalar, ends)
    return [] if earliest is None or latest is None else range(earliest, latest + 1, 24)


def of_hours(hours: Sequence[int]) -> ColumnElement[bool]:
    """Each looked up, unless they are more than a statement should name."""
    if len(hours) > MOST_NAMED:
        return Usage.hour.between(hours[0], hours[-1])
    return Usage.hour.in_(hours)


def forget_user(session: Session, owner_id: str | None, user_id: str) -> int:
    """Remove a person's own sums; what all did together stays. How many sums there were.

    An owner of None is every owner. Whoever adds to the sums has added what they read, or waits.
    """
    session.execute(TURN.with_for_update())
    single = update(UsageDelta).where(UsageDelta.user_id == user_id)
    theirs = delete(Usage).where(Usage.kind == UsageKind.USER_DAY, Usage.name == user_id)
    if owner_id is not None:
        single = single.where(UsageDelta.owner_id == owner_id)
        theirs = theirs.where(Usage.owner_id == owner_id)
    session.execute(single.values(user_id=None).execution_options(synchronize_session=False))
    found = session.execute(theirs.execution_options(synchronize_session=False))
    return int(found.rowcount)  # type: ignore[attr-defined]
