"""Streams over a real server: what is sent is what is stored, whoever hangs up or dies."""

import asyncio
import contextlib
import json
import socket
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import create_engine
from websockets.sync.client import connect

from database import Database, transaction
from models import LOCAL_OWNER, GenerateRequest, GenerationRecord, Status
from services.live import LiveGenerations
from services.streams import Done, Piece, Start, Streams, follow
from tests.databases import execute, fresh_database
from tests.service import Server, in_process, ready, serving, sessions_of
from tests.sse import Event, events, text_of
from tests.test_history import insert

PROMPT: dict[str, Any] = {"prompt": "Once upon a time", "max_length": 60, "seed": 7}
LONG: dict[str, Any] = {"prompt": "Once upon a time", "max_length": 200, "seed": 7}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("streams")
    with serving(folder / "log", DATABASE_URL=f"sqlite:///{folder / 'records.db'}") as server:
        yield server


def post_stream(server: Server, body: dict[str, Any]) -> list[Event]:
    with httpx.stream("POST", f"{server.url}/generate/stream", json=body, timeout=60) as answer:
        return list(events(answer.iter_lines()))


def resume(server: Server, record_id: int, last: str | None = None) -> list[Event]:
    headers = {} if last is None else {"Last-Event-ID": last}
    url = f"{server.url}/history/{record_id}/stream"
    with httpx.stream("GET", url, headers=headers, timeout=60) as answer:
        assert answer.status_code == 200
        return list(events(answer.iter_lines()))


def record(server: Server, record_id: int) -> dict[str, Any]:
    url = f"{server.url}/history/{record_id}"
    found: dict[str, Any] = httpx.get(url, timeout=60).json()
    return found


def ended(server: Server, record_id: int) -> dict[str, Any]:
    deadline = time.monotonic() + 20
    while (found := record(server, record_id))["status"] == "in_progress":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def read_then_hang_up(server: Server, body: dict[str, Any], pieces: int) -> list[Event]:
    seen: list[Event] = []
    with httpx.stream("POST", f"{server.url}/generate/stream", json=body, timeout=60) as answer:
        for event in events(answer.iter_lines()):
            seen.append(event)
            if len(seen) > pieces:
                break
    return seen


def stored_text(database: Path, record_id: int) -> str:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        found = connection.execute(
            "SELECT completion FROM generation_records WHERE id = ?", (record_id,)
        )
        return str(found.fetchone()[0])


def test_a_stream_is_start_then_text_then_the_stored_record(server: Server) -> None:
    start, *pieces, done = post_stream(server, PROMPT)
    assert (start.name, done.name) == ("start", "done")
    assert done.data == record(server, start.data["id"])
    assert PROMPT["prompt"] + text_of(pieces) == done.data["generated_text"]
    assert len(pieces) > 1
    assert [event.name for event in pieces] == ["token"] * len(pieces)


def test_a_stream_gives_the_text_that_one_answer_gives(server: Server) -> None:
    streamed = post_stream(server, PROMPT)[-1].data
    at_once = httpx.post(f"{server.url}/generate", json=PROMPT, timeout=60).json()
    assert streamed["generated_text"] == at_once["generated_text"]


@pytest.mark.parametrize("place", [0, 1, 3, -2])
def test_head_and_resumed_tail_are_the_stored_text(server: Server, place: int) -> None:
    whole = post_stream(server, PROMPT)
    head = whole[: whole.index(whole[place]) + 1]
    tail = resume(server, whole[0].data["id"], head[-1].id)
    stored = record(server, whole[0].data["id"])["generated_text"]
    assert PROMPT["prompt"] + text_of(head) + text_of(tail) == stored


def test_a_record_is_followed_while_it_is_written(server: Server) -> None:
    with httpx.stream("POST", f"{server.url}/generate/stream", json=LONG, timeout=60) as answer:
        following = events(answer.iter_lines())
        start, first = next(following), next(following)
        second = resume(server, start.data["id"])
        rest = list(following)
    assert text_of(second) == text_of([first, *rest])
    assert second[-1] == rest[-1]


def ask_again(server: Server, path: str, last: str) -> httpx.Response:
    return httpx.get(f"{server.url}{path}", headers={"Last-Event-ID": last}, timeout=60)


def test_an_id_that_is_no_place_is_refused(server: Server) -> None:
    record_id = post_stream(server, PROMPT)[0].data["id"]
    path = f"/history/{record_id}/stream"
    places = [f"{record_id}:", f"{record_id}:-1", f"{record_id + 1}:0", f"{record_id + 1}:end"]
    for last in ("x", "5", "0:0", *places):
        assert ask_again(server, path, last).status_code == 422, last
    assert httpx.get(f"{server.url}/history/999999/stream").status_code == 404


@pytest.mark.parametrize("path", ["/text/generate/stream?prompt=Once", "/history/1/stream"])
@pytest.mark.parametrize("place", ["0", "end"])
def test_an_event_of_no_possible_record_is_refused(
    client: TestClient, path: str, place: str
) -> None:
    answer = client.get(path, headers={"Last-Event-ID": f"{2**63}:{place}"})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    largest = client.get(path, headers={"Last-Event-ID": f"{2**63 - 1}:0"})
    assert largest.status_code in (404, 422)


def test_a_browser_that_comes_back_goes_on_and_begins_nothing(server: Server) -> None:
    path = "/text/generate/stream?prompt=Once+upon+a+time"
    with httpx.stream("GET", server.url + path, timeout=60) as answer:
        following = events(answer.iter_lines())
        head = [next(following) for _ in range(2)]
    answer = ask_again(server, path, head[-1].id)
    tail = list(events(answer.text.splitlines()))
    found = ended(server, head[0].data["id"])
    assert found["generated_text"] == "Once upon a time" + text_of(head) + text_of(tail)
    over = ask_again(server, path, tail[-1].id)
    assert (over.status_code, over.content) == (204, b"")
    newest = httpx.get(f"{server.url}/history?limit=1").json()
    assert newest[0]["id"] == found["id"]


def test_a_stream_whose_end_was_seen_has_nothing_more(server: Server) -> None:
    done = post_stream(server, PROMPT)[-1]
    over = ask_again(server, f"/history/{done.data['id']}/stream", done.id)
    assert (over.status_code, over.content) == (204, b"")


def test_hanging_up_stops_the_generation_and_keeps_its_text(server: Server) -> None:
    seen = read_then_hang_up(server, LONG, pieces=3)
    found = ended(server, seen[0].data["id"])
    assert (found["status"], found["finish_reason"]) == ("cancelled", "disconnected")
    assert found["generated_text"].startswith(LONG["prompt"] + text_of(seen))
    assert 3 <= found["completion_tokens"] < 196
    assert resume(server, found["id"])[-1].data["code"] == "cancelled"


def test_on_disconnect_finish_finishes(server: Server) -> None:
    seen = read_then_hang_up(server, LONG | {"on_disconnect": "finish"}, pieces=3)
    found = ended(server, seen[0].data["id"])
    assert found["status"] == "completed"
    assert found["generated_text"] == LONG["prompt"] + text_of(resume(server, found["id"]))


def test_a_generation_is_cancelled_from_outside(server: Server) -> None:
    with (
        httpx.Client(timeout=60) as other,  # made before: that takes a while
        httpx.stream("POST", f"{server.url}/generate/stream", json=LONG, timeout=60) as answer,
    ):
        following = events(answer.iter_lines())
        start = next(following)
        next(following)
        url = f"{server.url}/history/{start.data['id']}/cancel"
        cancelled = other.post(url).json()
        last = list(following)[-1]
    assert (cancelled["status"], cancelled["finish_reason"]) == ("cancelled", "cancelled")
    assert (last.name, last.data["code"]) == ("error", "cancelled")
    assert httpx.post(url).status_code == 409


def test_errors_before_the_first_event_have_their_status(server: Server) -> None:
    url = f"{server.url}/generate/stream"
    assert httpx.post(url, json={"prompt": ""}).status_code == 422
    assert httpx.post(url, json={"prompt": "hate"}).status_code == 400


def test_another_process_on_the_database_follows_and_cancels(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path / 'records.db'}"
    with (
        serving(tmp_path / "a.log", DATABASE_URL=database) as here,
        serving(tmp_path / "b.log", DATABASE_URL=database) as there,
    ):
        seen = read_then_hang_up(here, LONG | {"on_disconnect": "finish"}, pieces=1)
        record_id = seen[0].data["id"]
        followed = resume(there, record_id)
        assert followed[-1].name == "done"
        assert LONG["prompt"] + text_of(followed) == followed[-1].data["generated_text"]
        assert record(here, record_id) == followed[-1].data


def test_after_a_kill_the_seen_text_is_stored_and_the_end_is_honest(tmp_path: Path) -> None:
    database = tmp_path / "records.db"
    environment = {"DATABASE_URL": f"sqlite:///{database}"}
    server = Server(environment, tmp_path / "log").wait_until_ready()
    try:
        bodies = [LONG | {"seed": seed, "on_disconnect": "finish"} for seed in range(40)]
        for body in bodies[:39]:  # enough work for the last one to be slow
            read_then_hang_up(server, body, pieces=0)
        seen = read_then_hang_up(server, bodies[39], pieces=0)
        record_id = seen[0].data["id"]
        stored, before = "", time.monotonic()
        while not stored and time.monotonic() - before < 10:
            stored = stored_text(database, record_id)
            time.sleep(0.01)
    finally:
        server.kill()
    assert stored
    again = Server(environment, tmp_path / "log").wait_until_alive()
    try:
        found = record(again, record_id)
        assert found["status"] in ("incomplete", "completed")
        assert found["generated_text"].startswith(LONG["prompt"] + stored)
        last = resume(again, record_id)[-1]
        expected = "interrupted" if found["status"] == "incomplete" else None
        assert last.data.get("code") == expected
    finally:
        again.kill()


def test_a_socket_carries_the_same_events(client: TestClient) -> None:
    with client.websocket_connect("/ws/generate") as socket:
        socket.send_text(json.dumps(PROMPT))
        found = [socket.receive_json()]
        while found[-1]["event"] not in ("done", "error"):
            found.append(socket.receive_json())
        assert [found[0]["event"], found[-1]["event"]] == ["start", "done"]
        text = "".join(event["data"]["text"] for event in found[1:-1])
        assert PROMPT["prompt"] + text == found[-1]["data"]["generated_text"]
        socket.send_text('{"prompt": ""}')
        assert socket.receive_json()["data"]["code"] == "validation_error"
        socket.send_text('{"prompt": "hate"}')
        assert socket.receive_json()["data"]["code"] == "content_refused"


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ({"bytes": b'{"prompt": "Once"}'}, "invalid_request"),
        ({"text": "{"}, "validation_error"),
        ({"text": '{"prompt": "' + "\u00e9" * 524_288 + '"}'}, "body_too_large"),
    ],
    ids=["binary", "no JSON", "too large"],
)
def test_a_bad_message_is_told_and_the_next_one_is_answered(
    client: TestClient, message: dict[str, Any], code: str
) -> None:
    with client.websocket_connect("/ws/generate", headers={"X-Request-ID": "mine"}) as socket:
        socket.send({"type": "websocket.receive"} | message)
        error = socket.receive_json()
        assert (error["event"], error["data"]["code"]) == ("error", code)
        assert set(error["data"]) == {"detail", "code", "request_id"}
        assert error["data"]["request_id"] == "mine"
        socket.send_text('{"prompt": "Once"}')
        assert socket.receive_json()["event"] == "start"


def rename(database: Path, table: str, name: str) -> None:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute(f"ALTER TABLE {table} RENAME TO {name}")


def test_a_database_that_fails_is_told_on_a_socket(tmp_path: Path) -> None:
    database = tmp_path / "records.db"
    with in_process(DATABASE_URL=f"sqlite:///{database}") as own:
        ready(own)
        rename(database, "generation_records", "elsewhere")
        with own.websocket_connect("/ws/generate") as socket:
            socket.send_text('{"prompt": "Once", "use_cache": true}')
            assert socket.receive_json()["data"]["code"] == "storage_unavailable"
        rename(database, "elsewhere", "generation_records")


def test_a_handshake_is_answered_with_its_request_id(server: Server) -> None:
    with connect(server.url.replace("http", "ws") + "/ws/generate") as socket:
        assert socket.response is not None
        given = socket.response.headers["X-Request-ID"]
        socket.send(b"\xff")
        assert json.loads(socket.recv(timeout=60))["data"]["request_id"] == given != ""
    log = server.log.read_text()
    assert "Traceback" not in log


def test_a_replayed_record_is_identical(client: TestClient) -> None:
    found = client.post("/generate", json=PROMPT).json()
    answer = client.post(f"/history/{found['id']}/replay").json()
    assert answer == {"id": found["id"], "result": "identical", "first_difference": None}


@pytest.mark.parametrize("grace", ["0", "20"])
def test_stopping_ends_every_row_and_in_time(tmp_path: Path, grace: str) -> None:
    database = tmp_path / "records.db"
    environment = {"DATABASE_URL": f"sqlite:///{database}", "DRAIN_SECONDS": grace}
    server = Server(environment, tmp_path / "log").wait_until_ready()
    for seed in range(8):
        read_then_hang_up(server, LONG | {"seed": seed, "on_disconnect": "finish"}, pieces=0)
    server.stop()
    with contextlib.closing(sqlite3.connect(database)) as connection:
        found = connection.execute("SELECT status, finish_reason FROM generation_records")
        statuses = set(found.fetchall())
    assert statuses <= {
        ("completed", "length"),
        ("completed", "stop"),
        ("incomplete", "interrupted"),
    }
    if grace == "0":
        assert ("incomplete", "interrupted") in statuses
    else:
        assert ("incomplete", "interrupted") not in statuses


def test_a_body_that_never_comes_does_not_hold_up_the_end(tmp_path: Path) -> None:
    environment = {"DATABASE_URL": f"sqlite:///{tmp_path / 'records.db'}", "DRAIN_SECONDS": "1"}
    server = Server(environment, tmp_path / "log").wait_until_ready()
    with socket.create_connection(("127.0.0.1", server.port)) as half:
        half.sendall(
            b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000\r\n\r\n{"
        )
        time.sleep(0.2)
        server.stop()
    assert "drained" in (tmp_path / "log").read_text()


def test_work_goes_on_when_a_stopping_server_closes_its_sockets(tmp_path: Path) -> None:
    database = tmp_path / "records.db"
    environment = {"DATABASE_URL": f"sqlite:///{database}", "DRAIN_SECONDS": "20"}
    server = Server(environment, tmp_path / "log").wait_until_ready()
    url = f"ws://127.0.0.1:{server.port}/ws/generate"
    with contextlib.ExitStack() as open_sockets:
        for seed in range(8):
            own = open_sockets.enter_context(connect(url))
            own.send(json.dumps(LONG | {"seed": seed}))
            assert json.loads(own.recv(timeout=60))["event"] == "start"
        server.stop()
    with contextlib.closing(sqlite3.connect(database)) as connection:
        found = connection.execute("SELECT status FROM generation_records")
        assert found.fetchall() == [("completed",)] * 8


def test_who_hangs_up_on_the_first_event_has_left(client: TestClient) -> None:
    service = client.app.state.generation  # type: ignore[attr-defined]
    with sessions_of(client)() as session:
        live = service.stream(session, LOCAL_OWNER, GenerateRequest(**LONG), finish_alone=False)

    async def hang_up() -> None:
        following = follow(live)
        assert isinstance(await anext(following), Start)
        await following.aclose()

    assert client.portal is not None
    client.portal.call(hang_up)
    service.live.wait_for_end(LOCAL_OWNER, live.record.id, 20)
    found = client.get(f"/history/{live.record.id}").json()
    assert (found["status"], found["finish_reason"]) == ("cancelled", "disconnected")


@contextlib.contextmanager
def unreachable(database: Database) -> Iterator[None]:
    """For the block, a PostgreSQL server throws its clients out and lets none in."""
    url = database.engine.url
    server = create_engine(url.set(database="postgres"), isolation_level="AUTOCOMMIT")
    allow = f"ALTER DATABASE {url.database} ALLOW_CONNECTIONS"
    try:
        execute(server, f"{allow} false")
        execute(
            server,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            f" WHERE datname = '{url.database}'",
        )
        yield
    finally:
        execute(server, f"{allow} true")
        server.dispose()


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[tuple[Database, GenerationRecord]]:
    """A record on PostgreSQL that another process generates."""
    with fresh_database("postgresql", tmp_path) as url:
        database = Database(url)
        database.open()
        with database.sessions() as session:
            record_id = insert(session, status=Status.IN_PROGRESS)
            running = session.get_one(GenerationRecord, record_id)
            session.commit()
        yield database, running
        database.close()


async def follow_without_database(
    database: Database, running: GenerationRecord, seconds: float
) -> list[Any]:
    streams = Streams(database, LiveGenerations(asyncio.get_running_loop()))
    following = streams.stored(running, None)
    found = [await anext(following), await anext(following)]

    async def rest() -> list[Any]:
        return [event async for event in following]

    with unreachable(database):
        following_on = asyncio.create_task(rest())
        await asyncio.sleep(seconds)
    with database.sessions() as session, transaction(session):
        session.get_one(GenerationRecord, running.id).status = Status.COMPLETED
    return found + await following_on


def test_who_follows_another_process_outlasts_a_moment_without_the_database(
    elsewhere: tuple[Database, GenerationRecord],
) -> None:
    found = asyncio.run(follow_without_database(*elsewhere, seconds=2.0))
    assert [type(event) for event in found] == [Start, Piece, Done]


def test_a_stream_without_its_database_ends_with_an_error_that_keeps_the_place(
    elsewhere: tuple[Database, GenerationRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.streams.PATIENCE_SECONDS", 0.2)
    _, piece, last = asyncio.run(follow_without_database(*elsewhere, seconds=2.0))
    assert last.error.code == "storage_unavailable"
    assert last.place == piece.place
