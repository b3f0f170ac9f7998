"""Looks a database over: what is damaged, lost, or left open. Changes nothing."""

import time
from collections.abc import Iterator
from itertools import chain

from sqlalchemy import Table
from sqlalchemy.exc import SQLAlchemyError

from database import Database, kind, transaction
from errors import StorageUnavailableError
from models import GenerationRecord, Lease
from repositories import checks, leases, transfer
from services.leases import BEAT_SECONDS, SILENT_BEATS, is_gone, this_machine

QUICK_RECORDS = 1_000_000  # whose search index SQLite checks within writers' patience


def problems(database: Database, whole: bool = False) -> Iterator[tuple[str, list[str]]]:
    """What was looked at, and what is wrong with it: nothing, where all is well.

    A large search index is checked by SQLite, which holds up whoever writes, only for the
    ``whole``.
    """
    looks = dict(LOOKS)
    if whole or is_quick(database):
        looks[SEARCH_CHECK] = search_damage
    for name, look in looks.items():
        try:
            yield name, look(database)
        except SQLAlchemyError as error:
            yield name, [f"it cannot be read ({kind(error)})"]
        except StorageUnavailableError:
            yield name, ["others wrote for too long to look at it"]


def damage(database: Database) -> list[str]:
    with database.sessions() as session:
        return checks.damage(session)


def parts(database: Database) -> list[str]:
    with database.sessions() as session:
        return checks.missing_parts(session)


def rows(database: Database) -> list[str]:
    """Servers keep to the types of columns by themselves."""
    if database.file is None:
        return []
    return [line for one in checks.numbered() for line in unreadable(database, one)]


def unreadable(database: Database, one: Table) -> list[str]:
    """Rows by their numbers: what is in them is nobody's business."""
    ids: list[int] = []
    after: int | None = -1
    while after is not None:
        with database.sessions() as session:  # one for all would keep the log from being emptied
            broken, after = checks.unreadable(session, one, after)
        ids += broken[: checks.MOST_NAMED - len(ids)]
    return [f"row {id} of {one.name} cannot be read" for id in ids]


def times(database: Database) -> list[str]:
    with database.sessions() as session:
        return counted(checks.unfound_by_time(session), "records are not found by their times")


def models(database: Database) -> list[str]:
    with database.sessions() as session:
        return counted(checks.unfound_by_model(session), "records are not found by their models")


def search_index(database: Database) -> list[str]:
    with database.sessions() as session:
        found = checks.unfound_by_words(session)
    lines = [counted(count, f"{what} are not found by a search") for what, count in found.items()]
    return [*chain.from_iterable(lines)]


def search_damage(database: Database) -> list[str]:
    with database.sessions() as session, transaction(session):
        return checks.search_damage(session)


def is_quick(database: Database) -> bool:
    try:
        with database.sessions() as session:
            return transfer.last_id(session, GenerationRecord) <= QUICK_RECORDS
    except SQLAlchemyError:  # the looks say so
        return True


def sums(database: Database) -> list[str]:
    with database.sessions() as session:
        lost = not checks.can_add_up(session)
    return ["the row is missing that is held to add to them"] if lost else []


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


SEARCH_CHECK = "the search index's own check"
LOOKS = {
    "the database's own check": damage,
    "tables, indexes and triggers": parts,
    "rows": rows,
    "links": links,
    "times": times,
    "models": models,
    "search index": search_index,
    "sums": sums,
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
