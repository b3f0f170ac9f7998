"""Queries on ``leases``."""

from collections.abc import Iterable

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from models import Lease


def add(session: Session, machine: str, process: str) -> Lease:
    lease = Lease(beat=0, machine=machine, process=process)
    session.add(lease)
    session.flush()
    return lease


def beat(session: Session, lease_id: int) -> bool:
    """Show that this process lives; False when its lease was taken away."""
    moved = update(Lease).where(Lease.id == lease_id).values(beat=Lease.beat + 1)
    return int(session.execute(moved).rowcount) == 1  # type: ignore[attr-defined]


def others(session: Session, lease_id: int) -> list[Lease]:
    return list(session.scalars(select(Lease).where(Lease.id != lease_id)))


def remove(session: Session, lease_ids: Iterable[int]) -> None:
    session.execute(delete(Lease).where(Lease.id.in_(list(lease_ids))))


def clear(session: Session) -> None:
    """Take every lease away, of living processes too."""
    session.execute(delete(Lease))
