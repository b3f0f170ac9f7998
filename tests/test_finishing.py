"""Endings that come together are stored together, and none is lost to another."""

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.orm import Session

from database import Database, release, transaction
from errors import ConflictError, GenerationFailedError, InterruptedGenerationError
from models import FinishReason, GenerationRecord, Status
from repositories import records
from repositories.records import RecordEnd
from services import history
from services.crowds import Crowds, SpoiltError
from services.endings import Ending
from services.finishing import Finisher, Values
from services.leases import LeaseKeeper
from tests.service import in_process, ready
from tests.test_history import OWNER, insert


def accepted(session: Session, count: int) -> list[GenerationRecord]:
    ids = [insert(session, status=Status.IN_PROGRESS, completion="") for _ in range(count)]
    found = [records.get(session, OWNER, record_id) for record_id in ids]
    session.expunge_all()
    session.rollback()
    return [record for record in found if record is not None]


def finisher_of(database: Database) -> Finisher:
    return Finisher(database, Crowds(database), LeaseKeeper(database))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60  # on a machine that runs much else
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@contextmanager
def held_up(finisher: Finisher) -> Iterator[None]:
    """What is finished meanwhile waits, and then comes all at once."""
    with busy(finisher.crowds):
        yield


@contextmanager
def busy(crowds: Crowds) -> Iterator[None]:
    """The writer has something to do until the end of the block."""
    begun, go = threading.Event(), threading.Event()

    def wait(_: Session, items: list[None]) -> list[None]:
        begun.set()
        go.wait(20)
        return items

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(crowds.write, wait, None)
        begun.wait(20)
        try:
            yield
        finally:
            go.set()
            done.result()


def finished(
    database: Database, finisher: Finisher, found: Sequence[GenerationRecord], spoilt: int = -1
) -> list[Future[GenerationRecord]]:
    """Finish all at once; the one at place ``spoilt`` with a number that no column holds."""

    def finish(place: int) -> GenerationRecord:
        tokens = 2**70 if place == spoilt else place
        ending = Ending(Status.COMPLETED, FinishReason.LENGTH, f"text {place}", tokens)
        with database.sessions() as session:
            return finisher.finish(session, found[place], ending, 1.0)

    with ThreadPoolExecutor(len(found)) as pool:
        with held_up(finisher):
            futures = [pool.submit(finish, place) for place in range(len(found))]
            wait_for(lambda: finisher.crowds.waiting.qsize() == len(found))
        return futures


def texts(session: Session, found: Sequence[GenerationRecord]) -> list[str | None]:
    stored = [records.get(session, OWNER, record.id) for record in found]
    return [record.completion if record else None for record in stored]


def test_endings_that_come_together_are_one_commit(database: Database, session: Session) -> None:
    found = accepted(session, 8)
    commits: list[object] = []
    event.listen(database.engine, "commit", commits.append)
    futures = finished(database, finisher_of(database), found)
    assert [future.result().id for future in futures] == [record.id for record in found]
    assert len(commits) == 2  # the first one is of what kept the writer busy
    assert texts(session, found) == [f"text {place}" for place in range(8)]


def test_an_ending_that_cannot_be_stored_takes_no_other_with_it(
    database: Database, session: Session
) -> None:
    found = accepted(session, 4)
    futures = finished(database, finisher_of(database), found, spoilt=1)
    with pytest.raises(GenerationFailedError):
        futures[1].result()
    assert [futures[place].result().status for place in (0, 2, 3)] == [Status.COMPLETED] * 3
    assert texts(session, found) == ["text 0", "", "text 2", "text 3"]
    spoilt = history.get(session, OWNER, found[1].id)
    assert (spoilt.status, spoilt.finish_reason) == (Status.FAILED, FinishReason.ERROR)


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_text_that_the_database_does_not_take_is_a_failure(
    database: Database, session: Session
) -> None:
    (record,) = accepted(session, 1)
    ending = Ending(Status.COMPLETED, FinishReason.LENGTH, "a\0b", 3)
    with pytest.raises(GenerationFailedError):
        finisher_of(database).finish(session, record, ending, 1.0)
    assert history.get(session, OWNER, record.id).status == Status.FAILED


def test_endings_that_are_refused_again_hold_up_no_others(
    database: Database, session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    found = accepted(session, 4)
    finisher = finisher_of(database)
    values = {
        "status": Status.COMPLETED,
        "finish_reason": FinishReason.LENGTH,
        "completion": "late",
        "completion_tokens": 1,
        "duration_ms": 1,
        "updated_at": datetime.now(UTC),
    }
    never, lost = values | {"model_name": None}, values | {"completion_tokens": 2**70}
    finisher.unstored += zip(found, (never, lost, values, values), strict=True)
    history.delete(session, OWNER, found[3].id)
    finisher.store_unstored()
    assert list(finisher.unstored) == [(found[0], never)]
    assert texts(session, found) == ["", "", "late", None]
    assert history.get(session, OWNER, found[1].id).status == Status.FAILED
    assert caplog.messages.count("record finished late") == 2  # not of the deleted one


def test_what_was_refused_is_tried_once_more_when_the_process_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("main.CHECKPOINT_SECONDS", 1000.0)  # so that only the end tries again
    file = tmp_path / "records.db"
    other = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    settings = {"DATABASE_URL": f"sqlite:///{file}", "DATABASE_TIMEOUT_SECONDS": "0.5"}
    with in_process(**settings) as client, closing(other):
        finisher: Finisher = ready(client).app.state.generation.finisher  # type: ignore[attr-defined]
        commit = finisher.commit

        def commit_while_locked(*given: Any) -> Values | None:
            other.execute("BEGIN IMMEDIATE")
            return commit(*given)

        monkeypatch.setattr(finisher, "commit", commit_while_locked)
        answer = client.post("/generate", json={"prompt": "Once"})
        assert (answer.status_code, answer.json()["code"]) == (503, "storage_unavailable")
        other.execute("ROLLBACK")
    with closing(sqlite3.connect(file)) as connection:
        found = connection.execute("SELECT status, completion <> '' FROM generation_records")
        assert found.fetchall() == [("completed", 1)]


def test_a_row_that_was_closed_before_is_told_to_its_own_request_alone(
    database: Database, session: Session
) -> None:
    found = accepted(session, 3)
    finisher = finisher_of(database)
    finished(database, finisher, found[2:])
    futures = finished(database, finisher, found)
    assert [futures[place].result().completion for place in (0, 1)] == ["text 0", "text 1"]
    with pytest.raises(InterruptedGenerationError):
        futures[2].result()
    assert texts(session, found) == ["text 0", "text 1", "text 0"]


def test_an_end_that_finds_no_row_is_a_conflict(database: Database, session: Session) -> None:
    (record,) = accepted(session, 1)
    history.delete(session, OWNER, record.id)
    (future,) = finished(database, finisher_of(database), [record])
    with pytest.raises(ConflictError):
        future.result()


def test_an_earlier_attempt_writes_nothing_into_a_later_one(
    database: Database, session: Session
) -> None:
    (record,) = accepted(session, 1)
    with transaction(session):
        records.interrupt(session, [], [record.id])
    closed = history.get(session, OWNER, record.id)
    release(session)
    with transaction(session):
        assert records.reopen(session, closed)
    with transaction(session):
        records.checkpoint(session, [records.Grown(record.id, "stale", 1, record.attempts)])
    (future,) = finished(database, finisher_of(database), [record])
    with pytest.raises(InterruptedGenerationError):
        future.result()
    found = history.get(session, OWNER, record.id)
    assert (found.status, found.attempts, found.completion) == (Status.IN_PROGRESS, 2, "")


def test_when_one_write_of_a_crowd_fails_nothing_of_it_is_stored(
    database: Database, session: Session
) -> None:
    crowds = Crowds(database)
    found = accepted(session, 3)

    def finish_all(shared: Session, items: list[tuple[int, int]]) -> list[bool]:
        ending = {"status": Status.COMPLETED, "completion_tokens": 8}
        ends = [RecordEnd(OWNER, record_id, ending) for record_id, _ in items]
        stored = records.finish_all(shared, ends)
        return [
            found and 1 // divisor == 1 for found, (_, divisor) in zip(stored, items, strict=True)
        ]

    def end(place: int, divisor: int) -> bool:
        return crowds.write(finish_all, (found[place].id, divisor), found[place].id)

    with ThreadPoolExecutor(3) as pool, busy(crowds):
        futures = [pool.submit(end, place, place != 1) for place in range(3)]
        wait_for(lambda: crowds.waiting.qsize() == 3)
    for future in futures:
        with pytest.raises(SpoiltError):
            future.result()
    with pytest.raises(ZeroDivisionError):
        end(0, 0)
    assert [end(place, 1) for place in range(3)] == [True] * 3
