"""Answers as they are written: server-sent events and a WebSocket, with the same events.

``start`` {"id"}, ``token`` {"text"}, then one of ``done`` (the record) and ``error`` (the error
body). An event's id, sent back as ``Last-Event-ID``, is where a stream goes on. After the last
event nothing more comes: that is a 204, at which a browser's ``EventSource`` stops asking.
"""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, HTTPException, Response, WebSocket
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool
from starlette.types import Message
from starlette.websockets import WebSocketDisconnect

from api.dependencies import (
    DbSession,
    Generation,
    OnceKey,
    Owner,
    StreamService,
    tell_replayed,
)
from api.errors import body_too_large, error_body, event_body, responses, stream_responses
from api.history import RecordId
from errors import InvalidRequestError
from models import LOCAL_OWNER, GenerationRecord, Record, StreamRequest
from services import history
from services.generation import Answer, GenerationService
from services.live import Live
from services.streams import Done, Event, Failed, Piece, Place, Start

router = APIRouter(tags=["streams"])


def begin_stream(
    request: StreamRequest,
    response: Response,
    session: DbSession,
    owner: Owner,
    service: Generation,
    key: OnceKey,
) -> Live | Answer:
    """Accept the prompt, or answer with an error, before the first byte of a stream."""
    begun = service.stream(session, owner, request, request.on_disconnect == "finish", key)
    tell_replayed(response, begun)
    return begun


def last_place(
    last_event_id: Annotated[
        str | None,
        Header(max_length=40, description="The `id` of the event seen last: it goes on after it."),
    ] = None,
) -> Place | None:
    """What the client has, by the id of the event that it saw last."""
    if not last_event_id:
        return None
    try:
        return Place.parse(last_event_id)
    except ValueError:
        raise InvalidRequestError("Last-Event-ID takes the id of an event of a stream.") from None


LastPlace = Annotated[Place | None, Depends(last_place)]
NOTHING_MORE: dict[int | str, dict[str, Any]] = {204: {"description": "All was sent before"}}


def expect_more(place: Place) -> None:
    """Raises HTTPException 204 after the last event."""
    if place.offset is None:
        raise HTTPException(204)


def find_record(
    record_id: RecordId, place: LastPlace, owner: Owner, service: StreamService
) -> GenerationRecord:
    if place is not None:
        if place.record_id != record_id:
            raise InvalidRequestError("Last-Event-ID is of another record's stream.")
        expect_more(place)
    return service.find(owner, record_id)


@router.post(
    "/generate/stream",
    response_class=EventSourceResponse,
    responses=stream_responses(400, 409, 413, 500, 503, 504),
)
async def generate_stream(
    begun: Annotated[Live | Answer, Depends(begin_stream)], service: StreamService
) -> AsyncIterator[ServerSentEvent]:
    """Continue a prompt, piece by piece. The record is stored before `done` is sent."""
    async for event in sent(service.play(begun)):
        yield event


@router.get(
    "/history/{record_id}/stream",
    response_class=EventSourceResponse,
    responses=NOTHING_MORE | stream_responses(404, 503),
)
async def resume_stream(
    record: Annotated[GenerationRecord, Depends(find_record)],
    place: LastPlace,
    service: StreamService,
) -> AsyncIterator[ServerSentEvent]:
    """Follow a record from where `Last-Event-ID` left it, while it is written and afterwards."""
    async for event in sent(service.resume(record, place)):
        yield event


@router.post(
    "/history/{record_id}/cancel", response_model=Record, responses=responses(404, 409, 503)
)
def cancel(
    record_id: RecordId, session: DbSession, owner: Owner, service: Generation
) -> GenerationRecord:
    """Stop a generation. Its text up to there is kept."""
    return history.cancel(session, owner, record_id, service.live)


@router.websocket("/ws/generate")
async def generate_socket(socket: WebSocket) -> None:
    """Each message is a request as for `POST /generate/stream`; its events come as messages."""
    await socket.accept()
    with suppress(WebSocketDisconnect):
        while True:
            await answer(socket, await socket.receive())


async def answer(socket: WebSocket, message: Message) -> None:
    """Play a request, or say what is wrong with it: the next one is as welcome."""
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message["code"])
    try:
        request = request_of(message, socket.app.state.settings.max_body_bytes)
        begun = await run_in_threadpool(begin_alone, socket, request)
        async with aclosing(socket.app.state.streams.play(begun)) as events:
            async for event in events:
                name, data = shape(event)
                await socket.send_json({"event": name, "id": str(event.place), "data": data})
    except WebSocketDisconnect:
        raise
    except Exception as error:
        await socket.send_json({"event": "error", "data": event_body(error)})


def request_of(message: Message, limit: int) -> StreamRequest:
    """Raises InvalidRequestError, HTTPException and pydantic's ValidationError."""
    text = message.get("text")
    if text is None:
        raise InvalidRequestError("Send the request as a text message, not a binary one.")
    if len(text.encode()) > limit:
        raise body_too_large(limit)
    return StreamRequest.model_validate_json(text)


def begin_alone(socket: WebSocket, request: StreamRequest) -> Live | Answer:
    state = socket.app.state
    service: GenerationService = state.generation
    with state.database.sessions() as session:
        return service.stream(session, LOCAL_OWNER, request, request.on_disconnect == "finish")


async def sent(events: AsyncGenerator[Event]) -> AsyncIterator[ServerSentEvent]:
    async with aclosing(events) as following:
        async for event in following:
            name, data = shape(event)
            yield ServerSentEvent(event=name, data=data, id=str(event.place))


def shape(event: Event) -> tuple[str, dict[str, Any]]:
    """An event's name and its data, ready for JSON."""
    match event:
        case Start(place):
            return "start", {"id": place.record_id}
        case Piece(text):
            return "token", {"text": text}
        case Done(record):
            return "done", Record.model_validate(record).model_dump(mode="json")
        case Failed(error):
            return "error", error_body(error)
