"""Records of a process that died are closed; those of one that lives are left alone."""

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy.orm import Session

from database import Database, transaction
from errors import StorageUnavailableError
from models import GenerationRecord, Lease, Status
from repositories import leases, records
from services.endings import Ending
from services.finishing import Finisher
from services.leases import SILENT_BEATS, LeaseKeeper, process_identity, this_machine
from tests.service import ROOT, Server, in_process, ready, sessions_of
from tests.test_history import insert
from tests.test_retention import WAITING, wait_until_waiting

HOLDER = textwrap.dedent(
    """
    import os, sys
    from database import Database
    from services.leases import LeaseKeeper
    from tests.test_history import insert
    database = Database(os.environ["DATABASE_URL"])
    keeper = LeaseKeeper(database)
    keeper.sweep()
    with database.sessions() as session:
        print(insert(session, status="in_progress", lease_id=keeper.lease_id), flush=True)
    sys.stdin.read()
    """
)


class Holder:
    """A process that holds a lease and a record in progress, until it is killed."""

    def __init__(self, url: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER],
            cwd=ROOT,
            env=os.environ | {"DATABASE_URL": url},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        self.record = int(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def holder(database: Database, database_url: str) -> Iterator[Holder]:
    found = Holder(database_url)
    yield found
    found.kill()


def state(database: Database, record: int) -> tuple[str, str | None]:
    with database.sessions() as session:
        found = session.get_one(GenerationRecord, record)
        return found.status, found.finish_reason


def foreign(session: Session) -> Lease:
    """A lease of another machine."""
    with transaction(session):
        return leases.add(session, "another machine", "1/1")


def test_a_process_is_known_by_its_id_and_its_start() -> None:
    assert process_identity(os.getpid()).startswith(f"{os.getpid()}/")
    assert process_identity(os.getpid()) == process_identity(os.getpid())
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert process_identity(process.pid)
    process.kill()
    while process_identity(process.pid):  # a zombie, until it is waited for, is dead
        time.sleep(0.01)
    process.communicate()
    assert process_identity(process.pid) == ""
    assert this_machine() == this_machine() != ""


def test_a_living_process_keeps_its_records(database: Database, holder: Holder) -> None:
    keeper = LeaseKeeper(database)
    for _ in range(SILENT_BEATS + 2):
        keeper.sweep()
    assert state(database, holder.record) == (Status.IN_PROGRESS, None)


def test_a_dead_process_loses_its_records_at_once(database: Database, holder: Holder) -> None:
    holder.kill()
    LeaseKeeper(database).sweep()
    assert state(database, holder.record) == ("incomplete", "interrupted")


def test_a_process_with_a_used_id_is_not_its_predecessor(database: Database) -> None:
    keeper = LeaseKeeper(database)
    with database.sessions() as session:
        with transaction(session):
            lease = leases.add(session, keeper.machine, f"{os.getpid()}/1").id
        record = insert(session, status=Status.IN_PROGRESS, lease_id=lease)
    keeper.sweep()
    assert state(database, record)[0] == "incomplete"


def test_silence_of_another_machine_is_counted_in_beats(database: Database) -> None:
    keeper = LeaseKeeper(database)
    with database.sessions() as session:
        lease = foreign(session)
        record = insert(session, status=Status.IN_PROGRESS, lease_id=lease.id)
    for _ in range(SILENT_BEATS):
        keeper.sweep()
        assert state(database, record)[0] == "in_progress"
    keeper.sweep()
    assert state(database, record) == ("incomplete", "interrupted")


def test_a_beat_of_another_machine_ends_its_silence(database: Database) -> None:
    keeper = LeaseKeeper(database)
    with database.sessions() as session:
        lease = foreign(session)
        record = insert(session, status=Status.IN_PROGRESS, lease_id=lease.id)
        for _ in range(3):
            for _ in range(SILENT_BEATS):
                keeper.sweep()
            with transaction(session):
                assert leases.beat(session, lease.id)
    assert state(database, record)[0] == "in_progress"


def test_a_record_without_a_lease_row_is_closed(database: Database) -> None:
    with database.sessions() as session:
        record = insert(session, status=Status.IN_PROGRESS, lease_id=4711)
    LeaseKeeper(database).sweep()
    assert state(database, record) == ("incomplete", "interrupted")


def test_who_was_judged_dead_takes_a_new_lease_and_cannot_finish(database: Database) -> None:
    keeper = LeaseKeeper(database)
    keeper.sweep()
    first = keeper.lease_id
    with database.sessions() as session:
        record = insert(session, status=Status.IN_PROGRESS, lease_id=first)
        with transaction(session):
            leases.remove(session, [first])
            records.interrupt(session, [first])
        with transaction(session):
            assert not records.finish(session, "local", record, status=Status.COMPLETED)
    keeper.beat()
    assert keeper.lease_id > first
    assert state(database, record) == ("incomplete", "interrupted")


@pytest.mark.parametrize("begun_again", [False, True])
def test_clients_of_who_was_judged_dead_are_told_to_ask_again(
    service: TestClient, monkeypatch: pytest.MonkeyPatch, begun_again: bool
) -> None:
    """Another process takes the lease, and may run the record again, just before the end here."""
    finisher: Finisher = service.app.state.generation.finisher  # type: ignore[attr-defined]
    finish = finisher.finish

    def finish_late(
        session: Session, record: GenerationRecord, ending: Ending, seconds: float
    ) -> GenerationRecord:
        with sessions_of(service)() as elsewhere, transaction(elsewhere):
            leases.remove(elsewhere, [record.lease_id or 0])
            records.interrupt(elsewhere, [record.lease_id or 0])
            if begun_again:
                lease = leases.add(elsewhere, "another machine", "1/1").id
                closed = elsewhere.get_one(GenerationRecord, record.id)
                assert records.reopen(elsewhere, closed, lease_id=lease)
        return finish(session, record, ending, seconds)

    monkeypatch.setattr(finisher, "finish", finish_late)
    answer = service.post("/generate", json={"prompt": "Once"})
    assert (answer.status_code, answer.json()["code"]) == (503, "interrupted")
    assert answer.headers["Retry-After"] == "1"
    stored = service.get(f"/history/{answer.json()['id']}").json()
    assert stored["status"] == ("in_progress" if begun_again else "incomplete")
    assert stored["generated_text"] == "Once"


def test_a_lease_that_was_taken_back_is_not_used(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite gives its id to the next process."""
    keeper, other = LeaseKeeper(database), LeaseKeeper(database)

    def refuse(_: Session) -> set[int]:
        raise StorageUnavailableError

    with monkeypatch.context() as patch:
        patch.setattr(records, "open_leases", refuse)
        with pytest.raises(StorageUnavailableError):
            keeper.sweep()
    other.sweep()
    with database.sessions() as session:
        record = insert(session, status=Status.IN_PROGRESS, lease_id=other.lease_id)
        for _ in range(2):
            keeper.sweep()
        assert session.get_one(GenerationRecord, record).status == Status.IN_PROGRESS
    assert keeper.lease_id != other.lease_id


@pytest.mark.parametrize("database_url", WAITING, indirect=True)
def test_who_closes_records_and_who_ends_them_wait_in_no_circle(database: Database) -> None:
    def close() -> int:
        with database.sessions() as another, transaction(another):
            return records.interrupt(another, [4711])

    with database.sessions() as session, ThreadPoolExecutor() as threads:
        held: dict[str, Any] = {"status": Status.IN_PROGRESS, "lease_id": 4711}
        first, second = (insert(session, **held) for _ in range(2))
        with transaction(session):  # PostgreSQL moves it behind the other
            session.get_one(GenerationRecord, first).user_id = "anna"
        with transaction(session):
            records.hold(session, [first])
            closing = threads.submit(close)
            wait_until_waiting(database, closing)
            records.hold(session, [second])
        assert closing.result() == 2


def test_nothing_is_written_while_nothing_runs(database: Database) -> None:
    keeper = LeaseKeeper(database)
    keeper.sweep()
    with database.sessions() as session:
        before = session.get_one(Lease, keeper.lease_id).beat
    keeper.tick()
    with database.sessions() as session:
        assert session.get_one(Lease, keeper.lease_id).beat == before


def test_a_stop_gives_the_lease_back(database: Database) -> None:
    keeper = LeaseKeeper(database)
    keeper.start()
    keeper.stop()
    with database.sessions() as session:
        assert leases.others(session, 0) == []


def test_a_server_closes_what_its_predecessor_left(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'records.db'}"
    with in_process(DATABASE_URL=url) as client:
        ready(client)
        holder = Holder(url)
        server = Server({"DATABASE_URL": url}, tmp_path / "log")
        try:
            server.wait_until_alive()
            living = httpx.get(f"{server.url}/history/{holder.record}", timeout=60).json()
            assert living["status"] == "in_progress"
            holder.kill()
            deadline = time.monotonic() + 30
            while client.get(f"/history/{holder.record}").json()["status"] == "in_progress":
                assert time.monotonic() < deadline
                time.sleep(0.1)
        finally:
            server.kill()
        closed = client.get(f"/history/{holder.record}").json()
    assert (closed["status"], closed["finish_reason"]) == ("incomplete", "interrupted")
    assert closed["prompt"] == "Once"


def test_a_record_that_its_own_process_does_not_run_is_closed(database: Database) -> None:
    keeper = LeaseKeeper(database)
    keeper.sweep()
    with database.sessions() as session:
        run, lost = (
            insert(session, status=Status.IN_PROGRESS, lease_id=keeper.lease_id) for _ in range(2)
        )
    keeper.hold(run)
    keeper.sweep()
    assert state(database, lost)[0] == "in_progress"  # it may just have ended
    keeper.sweep()
    assert state(database, lost) == ("incomplete", "interrupted")
    assert state(database, run)[0] == "in_progress"


def test_an_id_that_was_used_twice_is_held_until_both_dropped_it(database: Database) -> None:
    keeper = LeaseKeeper(database)
    keeper.hold(1)
    keeper.hold(1)
    keeper.drop(1)
    assert 1 in keeper.running
    keeper.drop(1)
    assert 1 not in keeper.running


def test_a_stop_leaves_no_record_open(database: Database) -> None:
    keeper = LeaseKeeper(database)
    keeper.start()
    with database.sessions() as session:
        record = insert(session, status=Status.IN_PROGRESS, lease_id=keeper.lease_id)
    keeper.hold(record)
    keeper.stop()
    assert state(database, record) == ("incomplete", "interrupted")
