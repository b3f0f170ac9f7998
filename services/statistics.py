"""Statistics: what happened in a time, added up from sums that are kept as it happens.

What counts is that a request ended, in the hour it was made; deleting its record changes nothing.
"""

from bisect import bisect_left
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import accumulate

from sqlalchemy.orm import Session

from database import Database, transaction
from errors import InvalidRequestError
from models import Latencies, Statistics, StatisticsQuery, UsageKind
from repositories import busiest, usage

FOLD_SECONDS = 1.0
AT_ONCE = 200  # requests added to the sums in one transaction: some 20 ms
MOST_HOURS = 31 * 24
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
PERCENTILES = {"p50": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100}


class UsageFolder:
    """Adds up what was noted, in the background."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def tick(self) -> None:
        """Until there is less than a transaction's worth."""
        while self.fold() == AT_ONCE:
            pass

    def fold(self) -> int:
        with self.database.sessions() as session:
            if not usage.is_noted(session):
                return 0
        with self.database.sessions() as session, transaction(session):
            return usage.fold(session, AT_ONCE)


def statistics(session: Session, owner_id: str, query: StatisticsQuery) -> list[Statistics]:
    """Newest first, then the busiest. Raises InvalidRequestError."""
    step = HOUR if query.bucket == "hour" else DAY
    first, last = whole(query, step)
    kind, names = UsageKind.MODEL_HOUR if step is HOUR else UsageKind.MODEL_DAY, None
    if query.by == "user":
        kind = UsageKind.USER_DAY
        names = busiest.users(session, owner_id, first, last, query.limit)
    bucket = last - first if query.bucket == "all" else step
    groups: dict[tuple[int, str], usage.Sums] = {}
    for row in usage.between(session, owner_id, kind, first, last, names):
        moment = usage.EPOCH + row.hour * HOUR if row.created_at is None else row.created_at
        key = (moment - first) // bucket, "" if query.by is None else row.name
        if (sums := groups.get(key)) is None:
            sums = groups[key] = usage.Sums()
        sums.add(row, row.latencies)
    found = [
        shown(query, first + number * bucket, first + (number + 1) * bucket, name, sums)
        for (number, name), sums in groups.items()
    ]
    return sorted(found, key=lambda item: (item.starts_at, item.requests), reverse=True)


def whole(query: StatisticsQuery, step: timedelta) -> tuple[datetime, datetime]:
    """The time that is asked for, widened to whole buckets. Raises InvalidRequestError."""
    if query.by == "user" and query.bucket == "hour":
        raise InvalidRequestError("By user the smallest bucket is a day.")
    try:
        last = floor(query.created_before or datetime.now(UTC), step) + step
        if query.created_before == last - step:
            last -= step
        first = floor(query.created_after or last - 30 * DAY, step)
    except OverflowError:
        raise InvalidRequestError("The time is too close to the end of the calendar.") from None
    if query.bucket == "hour" and last - first > MOST_HOURS * HOUR:
        raise InvalidRequestError("By the hour, a range is at most 31 days long.")
    return first, last


def floor(moment: datetime, step: timedelta) -> datetime:
    hour = moment.replace(minute=0, second=0, microsecond=0)
    return hour if step is HOUR else hour.replace(hour=0)


def shown(
    query: StatisticsQuery, starts_at: datetime, ends_at: datetime, name: str, sums: usage.Sums
) -> Statistics:
    return Statistics(
        starts_at=starts_at,
        ends_at=ends_at,
        model_name=name if query.by == "model" else None,
        user_id=name or None if query.by == "user" else None,
        **sums.counts,
        total_tokens=sums.counts["prompt_tokens"] + sums.counts["completion_tokens"],
        duration_ms=percentiles(*sums.distribution()),
    )


def percentiles(milliseconds: Sequence[int], counts: Sequence[int]) -> Latencies | None:
    """By the nearest rank: the smallest latency that so many per cent did not exceed.

    So many requests took so many milliseconds, which are in their order.
    """
    if not milliseconds:
        return None
    seen = list(accumulate(counts))
    ranks = {name: -(-percent * seen[-1] // 100) for name, percent in PERCENTILES.items()}
    return Latencies(
        **{name: milliseconds[bisect_left(seen, rank)] for name, rank in ranks.items()}
    )
