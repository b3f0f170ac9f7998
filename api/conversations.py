"""Conversations and their messages."""

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent

from api.dependencies import (
    DbSession,
    Generation,
    OnceKey,
    Owner,
    ReplyService,
    StreamService,
    reader_of,
    tell_replayed,
)
from api.errors import responses, stream_responses
from api.history import link_next_page
from api.shapes import shaped
from api.streams import NOTHING_MORE, LastPlace, expect_more, sent
from models import (
    Conversation,
    ConversationCreate,
    ConversationItem,
    ConversationOut,
    ConversationQuery,
    ConversationUpdate,
    GenerateRequest,
    GenerationRecord,
    Message,
    MessageCreate,
    MessagePage,
    MessageStreamRequest,
    MessageUpdate,
    TextStreamQuery,
)
from services import conversations, search
from services.generation import Answer
from services.live import Live
from services.streams import Event

router = APIRouter(tags=["conversations"])

ConversationId = Annotated[int, Path(ge=1, le=2**63 - 1)]
MessageId = Annotated[int, Path(ge=1, le=2**63 - 1)]


@router.get("/conversations", response_model=list[ConversationItem], responses=responses(400, 503))
def list_conversations(
    request: Request,
    response: Response,
    session: DbSession,
    owner: Owner,
    query: Annotated[ConversationQuery, Query()],
) -> list[ConversationItem]:
    """Newest first, by `skip` and `take`, or from page to page by the `Link` header; with `q`,
    those that hold its words in the title or in a message."""
    found, more = conversations.page(session, owner, query)
    if more:
        link_next_page(request, response, found[-1].id)
    items = [ConversationItem.model_validate(conversation) for conversation in found]
    if query.q is not None:
        for item, conversation in zip(items, found, strict=True):
            item.snippet = search.conversation_snippet(session, owner, conversation, query.q)
    return items


@router.post(
    "/conversations",
    status_code=201,
    response_model=ConversationOut,
    responses=responses(400, 413, 503),
)
def create_conversation(
    request: ConversationCreate, session: DbSession, owner: Owner, replies: ReplyService
) -> Conversation:
    """Begin a conversation. With `initial_prompt` and no `title` the model suggests one."""
    return replies.open(session, owner, request)


@router.get(
    "/conversations/{conversation_id}",
    response_model=ConversationOut,
    responses=responses(404, 503),
)
async def get_conversation(
    conversation_id: ConversationId, request: Request, owner: Owner
) -> Response:
    return shaped(await conversations.read(reader_of(request), owner, conversation_id))


@router.put(
    "/conversations/{conversation_id}",
    status_code=202,
    response_model=ConversationOut,
    responses=responses(400, 404, 413, 503),
)
def update_conversation(
    conversation_id: ConversationId, request: ConversationUpdate, session: DbSession, owner: Owner
) -> Conversation:
    """Change the title or the model type; what is left out stays."""
    return conversations.change(session, owner, conversation_id, request)


@router.delete("/conversations/{conversation_id}", status_code=204, responses=responses(404, 503))
def delete_conversation(
    conversation_id: ConversationId, session: DbSession, owner: Owner, service: Generation
) -> None:
    """Delete a conversation and its messages."""
    conversations.delete(session, owner, conversation_id, service.live.all())


@router.get(
    "/conversations/{conversation_id}/messages",
    response_model=list[Message],
    responses=responses(404, 503),
)
def list_messages(
    request: Request,
    response: Response,
    conversation_id: ConversationId,
    session: DbSession,
    owner: Owner,
    page: Annotated[MessagePage, Query()],
) -> list[GenerationRecord]:
    """Oldest first. A `Link` header leads to the next page while there is one."""
    found, more = conversations.messages(session, owner, conversation_id, page)
    if more:
        link_next_page(request, response, found[-1].id)
    return found


@router.post(
    "/conversations/{conversation_id}/messages",
    status_code=201,
    response_model=Message,
    responses=responses(400, 404, 409, 413, 500, 503, 504),
)
def create_message(
    conversation_id: ConversationId,
    request: MessageCreate,
    response: Response,
    session: DbSession,
    owner: Owner,
    replies: ReplyService,
    key: OnceKey,
) -> GenerationRecord:
    """Say something and get a reply that knows the whole thread; or store an exchange as it is."""
    answer = replies.reply(session, owner, conversation_id, request, key)
    tell_replayed(response, answer)
    return answer.record


def begin_reply(
    conversation_id: ConversationId,
    request: MessageStreamRequest,
    response: Response,
    session: DbSession,
    owner: Owner,
    replies: ReplyService,
    key: OnceKey,
) -> Live | Answer:
    """Accept the message, or answer with an error, before the first byte of a stream."""
    alone = request.on_disconnect == "finish"
    begun = replies.stream(session, owner, conversation_id, request, alone, key)
    tell_replayed(response, begun)
    return begun


@router.post(
    "/conversations/{conversation_id}/messages/stream",
    response_class=EventSourceResponse,
    responses=stream_responses(400, 404, 409, 413, 500, 503, 504),
)
async def stream_message(
    begun: Annotated[Live | Answer, Depends(begin_reply)], service: StreamService
) -> AsyncIterator[ServerSentEvent]:
    """The reply as it is written; `done` holds the record."""
    async for event in sent(service.play(begun)):
        yield event


@router.get("/messages/{message_id}", response_model=Message, responses=responses(404, 503))
def get_message(message_id: MessageId, session: DbSession, owner: Owner) -> GenerationRecord:
    return conversations.message(session, owner, message_id)


@router.put(
    "/messages/{message_id}",
    status_code=202,
    response_model=Message,
    responses=responses(400, 404, 409, 413, 503),
)
def update_message(
    message_id: MessageId,
    request: MessageUpdate,
    session: DbSession,
    owner: Owner,
    replies: ReplyService,
) -> GenerationRecord:
    """Correct a message by hand; what is left out stays."""
    return replies.correct(session, owner, message_id, request)


@router.delete("/messages/{message_id}", status_code=204, responses=responses(404, 503))
def delete_message(
    message_id: MessageId, session: DbSession, owner: Owner, service: Generation
) -> None:
    conversations.delete_message(session, owner, message_id, service.live.all())


def begin_text(
    query: Annotated[TextStreamQuery, Query()],
    session: DbSession,
    owner: Owner,
    service: Generation,
    replies: ReplyService,
    streams: StreamService,
    place: LastPlace,
) -> AsyncGenerator[Event]:
    if place is not None:  # a browser that was cut off and comes back by itself
        expect_more(place)
        return streams.resume(streams.find(owner, place.record_id), place)
    alone = query.on_disconnect == "finish"
    if query.conversation_id is None:
        request = GenerateRequest(prompt=query.prompt)
        return streams.play(service.stream(session, owner, request, alone))
    message = MessageCreate(prompt_content=query.prompt)
    return streams.play(replies.stream(session, owner, query.conversation_id, message, alone))


@router.get(
    "/text/generate/stream",
    response_class=EventSourceResponse,
    responses=NOTHING_MORE | stream_responses(400, 404, 409, 500, 503, 504),
)
async def stream_text(
    events: Annotated[AsyncGenerator[Event], Depends(begin_text)],
) -> AsyncIterator[ServerSentEvent]:
    """A prompt continued, or answered in a conversation, for a browser's `EventSource`: when it
    comes back with `Last-Event-ID`, it goes on where it was."""
    async for event in sent(events):
        yield event
