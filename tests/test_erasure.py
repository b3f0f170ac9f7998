"""A person who is erased is in no row, no index and, on SQLite, in no byte of a file."""

import resource
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select
from sqlalchemy.orm import Session

from database import Database, transaction
from models import Conversation, GenerationRecord, HistoryQuery, StatisticsQuery, Status
from repositories import conversations, records, removal
from services import erasure, history, statistics
from services.erasure import Erased
from tests.database_servers import Redis
from tests.service import in_process, ready, sessions_of
from tests.test_history import NOON, OWNER, insert
from tests.test_retention import WAITING, answer_often, updates, wait_until_waiting
from tests.test_transfer import show

CANARY = "canary4711"


def thread(session: Session, title: str, **given: Any) -> int:
    times = {"created_at": NOON, "updated_at": NOON}
    with transaction(session):
        return conversations.add(session, OWNER, title=title, model_type="m", **times | given).id


def kept(session: Session, kind: Any = GenerationRecord) -> list[int]:
    session.rollback()
    return list(session.scalars(select(kind.id).order_by(kind.id)))


def test_a_person_goes_and_nobody_else(database: Database) -> None:
    with database.sessions() as session:
        alone, shared = thread(session, CANARY), thread(session, CANARY, initial_prompt=CANARY)
        joined = thread(session, "Of others")
        other = insert(session, user_id="bert", conversation_id=joined)
        for values in (
            {"conversation_id": alone},
            {"conversation_id": shared, "pinned": True},
            {"conversation_id": joined},
            {"status": Status.IN_PROGRESS, "lease_id": 7},
            {"status": Status.FAILED},
        ):
            show(session, insert(session, user_id="anna", prompt=CANARY, **values))
        stay = [
            other,
            insert(session, user_id="bert", conversation_id=shared),
            insert(session, user_id="Anna"),
            insert(session, user_id=None),
            insert(session, user_id="anna", owner="somebody else"),
        ]
        with transaction(session):
            for cached in session.scalars(
                select(GenerationRecord).where(GenerationRecord.source_id.is_not(None))
            ):
                cached.user_id = "anna"
        assert erasure.erase(database, OWNER, "anna") == Erased(10, 1)
        assert kept(session) == stay
        assert kept(session, Conversation) == [shared, joined]
        begun = session.get_one(Conversation, shared)
        assert (begun.title, begun.initial_prompt) == ("Text removed", None)
        assert session.get_one(Conversation, joined).title == "Of others"
        session.rollback()
        by_user = StatisticsQuery(by="user", created_after=NOON, created_before=NOON)
        counted = statistics.statistics(session, OWNER, by_user)
        assert "anna" not in {one.user_id for one in counted}
        session.rollback()
        found, _ = history.page(session, OWNER, HistoryQuery(q=CANARY))
        assert found == []
        session.rollback()
        assert erasure.erase(database, OWNER, "anna") == Erased(0, 0)
        assert erasure.erase(database, None, "anna") == Erased(1, 0)


def test_answers_of_others_keep_the_text_they_show(database: Database) -> None:
    with database.sessions() as session:
        shown = show(session, insert(session, user_id="anna", prompt="Es war"))
    erasure.erase(database, OWNER, "anna")
    with database.sessions() as session:
        assert history.get(session, OWNER, shown).generated_text == "Es war upon a time"


def test_a_text_that_was_answered_often_goes_once(database: Database) -> None:
    with database.sessions() as session:
        answer_often(session, 300, 0, user_id="anna")
    with updates(database) as changed:
        assert erasure.erase(database, OWNER, "anna").records == 301
    assert sum(changed) < 500


def files_with(folder: Path, word: str) -> list[str]:
    found = [path for path in sorted(folder.iterdir()) if path.is_file()]
    return [path.name for path in found if word.encode() in path.read_bytes().lower()]


@pytest.mark.parametrize("database_url", WAITING, indirect=True)
@pytest.mark.parametrize("removed", [True, False])
def test_who_changes_a_message_of_an_erased_person_waits_in_no_circle(
    database: Database, removed: bool
) -> None:
    with database.sessions() as session, ThreadPoolExecutor() as threads:
        talk = thread(session, CANARY)
        said = [insert(session, user_id="anna", conversation_id=talk) for _ in range(40)]
        with transaction(session):
            assert conversations.hold(session, OWNER, talk)
            erasing = threads.submit(erasure.erase, database, OWNER, "anna")
            wait_until_waiting(database, erasing)
            records.hold(session, said)
            if removed:  # all that the erasure has seen by now
                removal.remove_all(session, said[:20])
        assert erasing.result().records == len(said) - 20 * removed
        assert kept(session) == kept(session, Conversation) == []


def test_nothing_of_an_erased_person_is_left_in_the_files(tmp_path: Path) -> None:
    with in_process(DATABASE_URL=f"sqlite:///{tmp_path / 'records.db'}") as client:
        ready(client)
        with sessions_of(client)() as session:
            for number in range(300):
                size = 1 + number % 7 * 2000 // 3
                text = f"{CANARY} " * size if number % 10 == 0 else f"{CANARY}{number} and so on"
                user = "anna" if number % 3 else "bert"
                words = text if user == "anna" else "something else"
                insert(session, user_id=user, prompt=words, completion=words)
            talk = thread(session, f"About {CANARY}", initial_prompt=CANARY)
            insert(session, user_id="anna", conversation_id=talk)
        stopping = threading.Event()
        threads = [threading.Thread(target=stream, args=(client, stopping)) for _ in range(3)]
        for one in threads:
            one.start()
        while not client.get("/users/anna/history?limit=1").json()[0]["prompt"].endswith("runs"):
            time.sleep(0.01)
        assert files_with(tmp_path, CANARY) != []
        stopping.set()
        answer = client.delete("/users/anna")
        assert answer.status_code == 200
        assert answer.json()["records"] > 200
        assert answer.json()["conversations"] == 1
        for one in threads:
            one.join()
        assert client.get("/users/anna/history").json() == []
        assert files_with(tmp_path, CANARY) == []
        assert len(client.get("/users/bert/history?limit=100").json()) == 100
    assert files_with(tmp_path, CANARY) == []


def stream(client: TestClient, stopping: threading.Event) -> None:
    """Generate for her, one after the other, until the erasure begins."""
    while not stopping.is_set():
        body = {"prompt": f"{CANARY} runs", "user_id": "anna", "max_length": 200}
        client.post("/generate/stream", json=body)


def test_a_large_file_is_left_to_the_operator_and_the_answer_says_so(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'records.db'}")
    database.migrate()
    with database.sessions() as session:
        insert(session, user_id="anna")
    assert erasure.erase(database, OWNER, "anna", most_bytes=0) == Erased(1, 0, cleared=False)
    assert erasure.erase(database, OWNER, "anna") == Erased(0, 0, cleared=True)
    database.close()


def test_a_full_disk_is_503_and_to_ask_again_goes_on(tmp_path: Path) -> None:
    with in_process(DATABASE_URL=f"sqlite:///{tmp_path / 'records.db'}") as client:
        ready(client)
        with sessions_of(client)() as session:
            insert(session, user_id="anna", prompt=CANARY * 1000)
            for _ in range(20):
                insert(session, user_id="bert", prompt="something " * 10_000)
        assert client.app.state.database.truncate_log()  # type: ignore[attr-defined]
        with files_no_larger_than(1 << 20):  # the deletions' log has room, the file anew has not
            answer = client.delete("/users/anna")
            assert (answer.status_code, answer.json()["code"]) == (503, "storage_unavailable")
        assert client.delete("/users/anna").json()["cleared"] is True
        assert files_with(tmp_path, CANARY) == []


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """For this process; what writes on meets what a full disk would say."""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))


def test_redis_points_at_nothing_of_an_erased_person(tmp_path: Path) -> None:
    own = Redis()
    url = f"sqlite:///{tmp_path / 'records.db'}"
    with in_process(DATABASE_URL=url, REDIS_URL=own.url) as client, own.client as server:
        ready(client)
        before = set(server.keys())
        for _ in range(2):
            assert client.post("/analyze/anna", json={"text": "Once"}).status_code == 200
        assert set(server.keys()) - before
        client.delete("/users/anna")
        assert set(server.keys()) <= before
    own.stop()
