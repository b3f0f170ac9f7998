"""What surrounds every request: its id, its log line, a bound on its body, and a last resort."""

import asyncio
import logging
import re
import secrets
import time
from contextlib import suppress
from functools import cache

from prometheus_client import Counter, Histogram
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import log as logs
import metrics
from api.errors import body_too_large, body_too_late, http_error, internal_error

log = logging.getLogger(__name__)

SANE_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


class RequestContext:
    """Give the request an id, log and count it, and answer 500 for what nobody handled."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self.answer(scope, receive, send)
        elif scope["type"] == "websocket":
            await self.converse(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = request_id_of(scope)
        token = logs.request_id.set(request_id)
        began, status = time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                add_request_id(message, request_id)
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            log.exception("request failed")
            if status:
                raise  # the answer has begun: only a cut connection is honest
            await internal_error()(scope, receive, send_with_id)
        finally:
            report(scope, status, time.perf_counter() - began)
            logs.request_id.reset(token)

    async def converse(self, scope: Scope, receive: Receive, send: Send) -> None:
        """All that is said on a WebSocket has the id of its handshake."""
        request_id = request_id_of(scope)
        token = logs.request_id.set(request_id)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "websocket.accept":
                add_request_id(message, request_id)
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            logs.request_id.reset(token)


def add_request_id(message: Message, request_id: str) -> None:
    headers = message.get("headers", ())
    message["headers"] = [*headers, (b"x-request-id", request_id.encode())]


def request_id_of(scope: Scope) -> str:
    """The caller's own, if it sent a sane one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and SANE_REQUEST_ID.fullmatch(value):
            return str(value, "ascii")
    return secrets.token_hex(16)


@cache  # to find them by their labels takes longer than to count
def counters(route: str, method: str, status: int) -> tuple[Counter, Histogram]:
    return metrics.REQUESTS.labels(route, method, status), metrics.LATENCY.labels(route)


def report(scope: Scope, status: int, seconds: float) -> None:
    """One log line and the counters of a request, by its route's template: a path has ids."""
    route = getattr(scope.get("route"), "path_format", "unknown")
    requests, latency = counters(route, scope["method"], status)
    requests.inc()
    latency.observe(seconds)
    level = logging.DEBUG if status < 400 else logging.INFO
    logs.event(
        log,
        level,
        "request",
        method=scope["method"],
        route=route,
        status=status,
        ms=round(seconds * 1000, 1),
    )


class Body:
    """The body of one request as it comes: HTTPException 413 where it is too large, and 408 where
    the next piece of it does not come in time."""

    def __init__(self, source: Receive, limit: int, patience: float) -> None:
        self.source = source
        self.limit = limit
        self.patience = patience
        self.received = 0
        self.ended = False
        self.answered = False  # who is being sent an answer need not have said all

    async def receive(self) -> Message:
        if self.ended or self.answered:
            return await self.source()
        message = await self.piece()
        if self.received > self.limit:
            await self.skip()
            raise body_too_large(self.limit)
        return message

    async def piece(self) -> Message:
        try:
            async with asyncio.timeout(self.patience):
                message = await self.source()
        except TimeoutError:
            if self.answered:
                return await self.source()
            self.ended = True
            raise body_too_late(self.patience) from None
        self.received += len(message.get("body", b""))
        self.ended = not message.get("more_body", False)
        return message

    async def skip(self) -> None:
        """Read on, up to a point: who is still sending would not see an answer."""
        with suppress(HTTPException):
            while not self.ended and self.received <= self.limit * 64:
                await self.piece()


class BodyLimit:
    """Bound what a body takes: MAX_BODY_BYTES, and SLOW_READER_SECONDS for its next piece."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        settings = scope["app"].state.settings
        body = Body(receive, settings.max_body_bytes, settings.slow_reader_seconds)

        async def noted(message: Message) -> None:
            body.answered = True
            await send(message)

        if announced_bytes(scope) > body.limit:
            await refuse(scope, body, send)
        else:
            await self.app(scope, body.receive, noted)


def announced_bytes(scope: Scope) -> int:
    """How long a body will be; 0 where it is not said."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value[:20])
    return 0


async def refuse(scope: Scope, body: Body, send: Send) -> None:
    """Answer before anything has come, so that who asked whether to send need not. The answer is
    ended when the rest was skipped: then the connection closes, which would lose it before."""

    async def unended(message: Message) -> None:
        if message["type"] == "http.response.body":
            message["more_body"] = True
        await send(message)

    await http_error(None, body_too_large(body.limit))(scope, body.source, unended)
    await body.skip()
    await send({"type": "http.response.body", "body": b"", "more_body": False})


class SlowReaderLimit:
    """Drop whoever does not take an answer: a send that does not get through in time ends it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = scope["app"].state.settings.slow_reader_seconds
        loop, request = asyncio.get_running_loop(), asyncio.current_task()
        assert request is not None
        dropped = False

        def drop() -> None:
            nonlocal dropped
            dropped = True
            request.cancel()

        async def in_time(message: Message) -> None:
            timer = loop.call_later(limit, drop)  # asyncio.timeout would cost three times as much
            try:
                await send(message)
            finally:
                timer.cancel()

        try:
            await self.app(scope, receive, in_time)
        except asyncio.CancelledError:
            if not dropped:
                raise
            request.uncancel()
            logs.event(log, logging.WARNING, "slow reader dropped")


class OneLineStartError:
    """Let the server print why the start failed, not the trace of how."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def shortened(message: Message) -> None:
            if message["type"] == "lifespan.startup.failed":
                line = message.get("message", "").strip().rpartition("\n")[2]
                message["message"] = line.removeprefix("errors.StartError: ")
            await send(message)

        await self.app(scope, receive, shortened if scope["type"] == "lifespan" else send)
