"""What surrounds every request, where a whole service would take too long to show it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

import pytest
from fastapi import FastAPI
from starlette.types import Message, Receive, Scope, Send

from api.middleware import SlowReaderLimit
from settings import Settings

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
