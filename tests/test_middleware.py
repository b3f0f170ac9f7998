"""What surrounds every request: over a socket, or where a whole service would take too long."""

import asyncio
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.types import Message, Receive, Scope, Send

from api.middleware import BodyLimit, SlowReaderLimit
from settings import Settings
from tests.service import Server, serving

LIMIT = 0.05
START = {"type": "http.response.start", "status": 200, "headers": []}
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]


async def never() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


async def take(_: Message) -> None:
    pass


async def take_nothing(_: Message) -> None:
    await asyncio.Event().wait()


async def serve(app: Asgi, send: Send) -> None:
    service = FastAPI()
    service.state.settings = Settings(slow_reader_seconds=LIMIT)
    await SlowReaderLimit(app)({"type": "http", "app": service}, never, send)


async def start(_scope: Scope, _receive: Receive, send: Send) -> None:
    await send(START)


async def start_from_a_task(scope: Scope, receive: Receive, send: Send) -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(start(scope, receive, send))


@pytest.mark.parametrize("app", [start, start_from_a_task])
def test_who_takes_nothing_is_dropped(app: Asgi, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> int:
        await serve(app, take_nothing)
        task = asyncio.current_task()
        assert task is not None
        return task.cancelling()

    with caplog.at_level(logging.WARNING):
        assert asyncio.run(run()) == 0  # the server may go on with the task
    assert caplog.messages == ["slow reader dropped"]


def test_an_answer_may_take_its_time(caplog: pytest.LogCaptureFixture) -> None:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send(START)
        await asyncio.sleep(3 * LIMIT)
        await send({"type": "http.response.body", "body": b""})

    asyncio.run(serve(app, take))
    assert caplog.messages == []


def test_who_hangs_up_is_not_called_slow(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        task = asyncio.create_task(serve(start, take_nothing))
        await asyncio.sleep(0)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(run())
    assert caplog.messages == []


PATIENCE = 0.5
MEGABYTE = 1_048_576


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that waits half a second for the next piece of a body."""
    folder = tmp_path_factory.mktemp("impatient")
    environment = {
        "DATABASE_URL": f"sqlite:///{folder / 'records.db'}",
        "SLOW_READER_SECONDS": str(PATIENCE),
        "MAX_BODY_BYTES": str(MEGABYTE),
    }
    with serving(folder / "log", **environment) as server:
        yield server


def head(length: str, *more: str, path: str = "/generate") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", length]
    return "\r\n".join([*lines, *more, "", ""]).encode()


def told(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """The status and the body of an answer after which the connection is closed."""
    connection.settimeout(20)
    answer = b""
    while piece := connection.recv(65_536):
        answer += piece
    first, _, rest = answer.partition(b"\r\n")
    return int(first.split()[1]), json.loads(rest.partition(b"\r\n\r\n")[2])


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port))


def test_who_asks_whether_to_send_too_much_is_told_at_once(impatient: Server) -> None:
    with connect(impatient) as connection:
        connection.sendall(head(f"Content-Length: {MEGABYTE + 1}", "Expect: 100-continue"))
        status, body = told(connection)
    assert (status, body["code"]) == (413, "body_too_large")


def test_who_asks_whether_to_send_enough_may(impatient: Server) -> None:
    with connect(impatient) as connection:
        connection.sendall(head(f"Content-Length: {MEGABYTE}", "Expect: 100-continue"))
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")


def test_who_sends_too_much_all_the_same_sees_the_answer(impatient: Server) -> None:
    with connect(impatient) as connection:
        connection.sendall(head(f"Content-Length: {9 * MEGABYTE}"))
        for _ in range(9):
            connection.sendall(b" " * MEGABYTE)
        status, body = told(connection)
    assert (status, body["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(
    ("length", "half"),
    [
        ("Content-Length: 1000", b'{"prompt"'),
        ("Content-Length: 1000", b""),
        ("Transfer-Encoding: chunked", b'9\r\n{"prompt"\r\n'),
    ],
)
def test_a_body_that_does_not_go_on_is_408(impatient: Server, length: str, half: bytes) -> None:
    with connect(impatient) as connection:
        connection.sendall(head(length) + half)
        status, body = told(connection)
    assert (status, body["code"]) == (408, "request_timeout")
    assert set(body) == {"detail", "code", "request_id"}


def test_too_large_a_body_that_does_not_go_on_is_let_go(impatient: Server) -> None:
    with connect(impatient) as connection:
        connection.sendall(head("Transfer-Encoding: chunked") + b"200000\r\n" + b" " * 2 * MEGABYTE)
        status, body = told(connection)
    assert (status, body["code"]) == (413, "body_too_large")


async def listen(receive: Receive) -> Message:
    async with asyncio.timeout(3 * LIMIT):
        return await receive()


async def listen_after_the_start(_: Scope, receive: Receive, send: Send) -> None:
    await send(START)
    await listen(receive)


async def listen_from_before_the_start(_: Scope, receive: Receive, send: Send) -> None:
    listening = asyncio.create_task(listen(receive))
    await asyncio.sleep(0)
    await send(START)
    await listening


@pytest.mark.parametrize("app", [listen_after_the_start, listen_from_before_the_start])
def test_who_is_being_answered_need_not_have_said_all(app: Asgi) -> None:
    service = FastAPI()
    service.state.settings = Settings(slow_reader_seconds=LIMIT)
    scope = {"type": "http", "app": service, "headers": []}
    with pytest.raises(TimeoutError):  # of the one who listens: to nothing else
        asyncio.run(BodyLimit(app)(scope, never, take))
