"""Looks a database over: what is damaged, lost, or left open. Changes nothing."""

import time
from collections.abc import Iterator

from sqlalchemy.exc import DBAPIError

from database import Database, kind
from models import Lease
from repositories import checks, leases
from services.leases import BEAT_SECONDS, SILENT_BEATS, is_gone, this_machine


def problems(database: Database) -> Iterator[tuple[str, list[str]]]:
    """What was looked at, and what is wrong with it: nothing, where all is well."""
    for name, look in LOOKS.items():
        try:
            yield name, look(database)
        except DBAPIError as error:
            yield name, [f"it cannot be read ({kind(error)})"]


def damage(database: Database) -> list[str]:
    with database.sessions() as session:
        return checks.damage(session)


def indexes(database: Database) -> list[str]:
    with database.sessions() as session:
        return checks.missing_indexes(session)


def links(database: Database) -> list[str]:
    with database.sessions() as session:
        return [
            *counted(checks.orphans(session), "records lack their conversation"),
            *counted(checks.sourceless(session), "answers from the cache lack their text"),
        ]


def states(database: Database) -> list[str]:
    with database.sessions() as session:
        found = checks.misplaced(session)
    return counted(found, "records are neither ended nor held by a process")


def open_records(database: Database) -> list[str]:
    return counted(held_by_the_dead(database), "records are held by no live process")


LOOKS = {
    "the database's own check": damage,
    "indexes": indexes,
    "links": links,
    "states": states,
    "open records": open_records,
}


def counted(number: int, what: str) -> list[str]:
    return [f"{number} {what}"] if number else []


def held_by_the_dead(database: Database) -> int:
    """Records in progress whose process is gone; a running service closes them within seconds."""
    with database.sessions() as session:
        held = checks.open_records(session)
        known = {lease.id: lease for lease in leases.others(session, 0)}
    if not held:
        return 0
    living = {id for id, lease in known.items() if here(lease) and not is_gone(lease)}
    elsewhere = {id: lease.beat for id, lease in known.items() if not here(lease)}
    if held.keys() & elsewhere.keys():
        living |= beating(database, elsewhere)
    return sum(count for lease, count in held.items() if lease not in living)


def here(lease: Lease) -> bool:
    return bool(lease.machine) and lease.machine == this_machine()


def beating(database: Database, before: dict[int, int]) -> set[int]:
    """Leases of other machines that beat while this process waits."""
    time.sleep(BEAT_SECONDS * SILENT_BEATS)
    with database.sessions() as session:
        now = {lease.id: lease.beat for lease in leases.others(session, 0)}
    return {lease for lease, beat in before.items() if now.get(lease, beat) != beat}
