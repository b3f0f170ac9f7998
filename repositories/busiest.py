"""Which users had the most requests in some days, without adding up everybody's.

A month of a large service has some hundred thousand sums of users. Few of them hold many requests:
those are found by an index, and tell nearly how many requests each user had. Who may be among the
busiest by that is added up exactly.
"""

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from models import BUSY, IS_BUSY, Usage, UsageKind
from repositories import usage

MOST_NAMED = 10_000  # users, in one statement


def users(
    session: Session, owner_id: str, first: datetime, last: datetime, count: int
) -> list[str]:
    """The busiest first; the empty name is of requests without one.

    They are among the busiest by the sums and those of whom something is noted: notes only add.
    Notes are read before the sums, so that what is added up meanwhile is not missed.
    """
    noted = usage.noted_of_users(session, owner_id, first, last)
    asked = Days(session, owner_id, first, last)
    requests = Counter(asked.totals(asked.candidates(count), count))
    if noted:
        requests |= Counter(asked.totals([*noted]))
        requests.update(noted)
    return sorted(requests, key=lambda name: (-requests[name], name))[:count]


class Days:
    """The sums of one owner's users, of each day between two times."""

    def __init__(self, session: Session, owner_id: str, first: datetime, last: datetime) -> None:
        self.session = session
        self.hours = usage.days(session, owner_id, UsageKind.USER_DAY, first, last)
        self.theirs = Usage.owner_id == owner_id, Usage.kind == UsageKind.USER_DAY

    def totals(self, names: Sequence[str] | None, count: int | None = None) -> dict[str, int]:
        """The most requests, of all users or, where they are not too many to name, of some."""
        requests = func.sum(Usage.requests)
        found = select(Usage.name, requests).where(*self.theirs, usage.of_hours(self.hours))
        if names is not None and len(names) <= MOST_NAMED:
            found = found.where(Usage.name.in_(names))
        ranked = found.group_by(Usage.name).order_by(requests.desc(), Usage.name)
        return {name: int(sum) for name, sum in self.session.execute(ranked.limit(count))}

    def candidates(self, count: int) -> list[str] | None:
        """All who may be among so many; None where that may be anybody."""
        least = self.half_of_a_busy_day(count)
        if least is None:
            return None
        many = self.busy(Usage.name, func.sum(Usage.requests), func.count())
        many = many.where(usage.of_hours(self.hours), Usage.requests >= least)
        known = self.session.execute(many.group_by(Usage.name)).all()
        sums = sorted((requests for _, requests, _ in known), reverse=True)
        # Who was below ``least`` on a day had at most this many requests then.
        most_unseen, days = least - 1, len(self.hours)
        if len(sums) < count or most_unseen * days >= sums[count - 1]:
            return None
        return [
            name
            for name, requests, seen in known
            if requests + most_unseen * (days - seen) >= sums[count - 1]
        ]

    def half_of_a_busy_day(self, count: int) -> int | None:
        """Half of the requests of the last of so many users, on a day when there were as many."""
        if self.hours:
            for hour in (self.hours[len(self.hours) // 2], self.hours[0], self.hours[-1]):
                of_day = self.busy(Usage.requests).where(Usage.hour == hour)
                of_day = of_day.order_by(Usage.requests.desc()).offset(count - 1)
                found: int | None = self.session.scalar(of_day.limit(1))
                if found is not None:
                    return max(found // 2, BUSY)
        return None

    def busy(self, *columns: Any) -> Select[Any]:
        return select(*columns).where(*self.theirs, IS_BUSY)
