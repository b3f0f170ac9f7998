"""A SQLite file that is damaged, full or read-only takes nothing, and nothing is answered."""

import contextlib
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine, event

from database import Database
from errors import StorageUnavailableError
from sqlite_file import WriteLock
from tests.service import ROOT, in_process, ready, sessions_of
from tests.test_history import insert

PAGE = 4096
LONG = {"prompt": "Once upon a time " * 29, "max_length": 130}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A database of some hundred pages."""
    file = tmp_path / "records.db"
    database = Database(f"sqlite:///{file}")
    database.migrate()
    with database.sessions() as session:
        for _ in range(50):
            insert(session, completion="x" * 9000)
    database.close()
    return file


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the write lock."""
    code = """
import sys
from pathlib import Path
from sqlite_file import WriteLock
with WriteLock(Path(sys.argv[1]), 5).hold():
    print("held", flush=True)
    sys.stdin.read()
"""
    arguments = [sys.executable, "-c", code, str(tmp_path / "records.db")]
    with subprocess.Popen(
        arguments, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def damage(file: Path) -> None:
    """Overwrite pages in the middle of the table, as a failing disk does."""
    with file.open("r+b") as opened:
        for page in range(40, 60):
            opened.seek(page * PAGE)
            opened.write(b"\xa5" * PAGE)


def refuses(client: TestClient) -> None:
    answer = client.post("/generate", json={"prompt": "Once"})
    assert (answer.status_code, answer.json()["code"]) == (503, "storage_unavailable")
    assert int(answer.headers["Retry-After"]) > 0


def test_a_damaged_file_is_never_ready_and_takes_no_writes(file: Path) -> None:
    damage(file)
    before = file.read_bytes()
    with in_process(DATABASE_URL=f"sqlite:///{file}") as client:
        assert client.get("/health/live").status_code == 200
        unready = client.get("/health/ready")
        assert unready.status_code == 503
        assert unready.json()["database"] == "it is damaged: restore a backup"
        assert client.delete("/history/1").status_code == 503
        answers = [client.get(f"/history/{id}").status_code for id in range(1, 51)]
        assert answers.count(200) > 10  # what is whole can still be read
    assert file.read_bytes() == before


def test_damage_that_a_request_meets_stops_the_writes(file: Path) -> None:
    with in_process(DATABASE_URL=f"sqlite:///{file}") as client:
        ready(client)
        client.app.state.database.engine.dispose()  # type: ignore[attr-defined]
        damage(file)
        answers = [client.get(f"/history/{id}").status_code for id in range(1, 51)]
        assert 503 in answers
        assert 500 not in answers
        refuses(client)
        assert client.get("/health/ready").json()["database"] == "it is damaged: restore a backup"


@contextlib.contextmanager
def every_connection(*pragmas: str) -> Iterator[None]:
    """SQLite connections that are made within the block get these pragmas."""

    def set_up(connection: sqlite3.Connection, _: object) -> None:
        if isinstance(connection, sqlite3.Connection):
            for pragma in pragmas:
                connection.execute(f"PRAGMA {pragma}")

    event.listen(Engine, "connect", set_up)
    try:
        yield
    finally:
        event.remove(Engine, "connect", set_up)


def pages(file: Path) -> int:
    with contextlib.closing(sqlite3.connect(file)) as connection:
        return int(connection.execute("PRAGMA page_count").fetchone()[0])


@pytest.mark.parametrize("fault", ["disk full", "read-only"])
def test_a_file_that_takes_nothing_more_is_503_until_it_does(file: Path, fault: str) -> None:
    pragma = f"max_page_count={pages(file)}" if fault == "disk full" else "query_only=ON"
    with in_process(DATABASE_URL=f"sqlite:///{file}") as client:
        ready(client)
        engine = client.app.state.database.engine  # type: ignore[attr-defined]
        stored = [client.get(f"/history/{id}").json() for id in range(41, 51)]
        with every_connection(pragma):
            engine.dispose()
            while (answer := client.post("/generate", json=LONG)).status_code == 200:
                stored.append(answer.json())
                assert len(stored) < 100
            assert (answer.status_code, answer.json()["code"]) == (503, "storage_unavailable")
            assert client.get("/health/ready").status_code in (200, 503)
        engine.dispose()
        for record in stored:
            assert client.get(f"/history/{record['id']}").json() == record
        assert client.post("/generate", json={"prompt": "Once"}).status_code == 200
        with sessions_of(client)() as session:
            insert(session)


def test_one_process_at_a_time_writes(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    file = tmp_path / "records.db"
    with pytest.raises(StorageUnavailableError), WriteLock(file, 0.05).hold():
        pass
    asked = threading.Event()

    def end() -> None:
        asked.set()
        assert holder.stdin is not None
        holder.stdin.close()

    timer = threading.Timer(0.05, end)
    timer.start()
    with WriteLock(file, 30).hold():
        assert asked.is_set()
    timer.join()


def test_a_process_that_dies_holds_no_lock(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    with WriteLock(tmp_path / "records.db", 0.05).hold():
        pass
