"""A commit that took effect but said that it failed is looked up, and never repeated blindly."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import event

from tests.databases import KINDS, fresh_database
from tests.service import in_process, ready


@pytest.fixture(params=KINDS)
def service(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TestClient]:
    with (
        fresh_database(request.param, tmp_path) as url,
        in_process(DATABASE_URL=url, LOG_LEVEL="WARNING") as client,
    ):
        yield ready(client)


@contextlib.contextmanager
def cut_after(service: TestClient, beginning: str) -> Iterator[None]:
    """The connection breaks once, when the commit of such a statement has been made."""
    engine = service.app.state.database.engine  # type: ignore[attr-defined]
    commit = engine.dialect.do_commit
    cut = threading.local()
    left = [1]

    def note(_: object, __: object, statement: str, *___: object) -> None:
        cut.next = statement.startswith(beginning) or getattr(cut, "next", False)

    def do_commit(connection: Any) -> None:
        commit(connection)
        if getattr(cut, "next", False) and left:
            left.pop()
            raise engine.dialect.dbapi.OperationalError("gone")
        cut.next = False

    event.listen(engine, "before_cursor_execute", note)
    engine.dialect.do_commit = do_commit
    try:
        yield
    finally:
        engine.dialect.do_commit = commit
        event.remove(engine, "before_cursor_execute", note)
    assert left == []


def test_an_accept_that_took_effect_after_all_is_closed(service: TestClient) -> None:
    with cut_after(service, "INSERT INTO generation_records"):
        answer = service.post("/generate", json={"prompt": "Once"})
    assert answer.status_code == 503
    deadline = time.monotonic() + 30
    while (found := service.get("/history").json())[0]["status"] == "in_progress":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert [(row["prompt"], row["status"], row["finish_reason"]) for row in found] == [
        ("Once", "incomplete", "interrupted")
    ]


def test_a_finish_that_took_effect_after_all_is_answered(service: TestClient) -> None:
    with cut_after(service, "UPDATE generation_records"):
        answer = service.post("/generate", json={"prompt": "Once"})
    assert answer.status_code == 200
    assert service.get(f"/history/{answer.json()['id']}").json() == answer.json()
    assert len(service.get("/history").json()) == 1
