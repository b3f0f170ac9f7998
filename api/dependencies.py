"""What routes ask for: a session, the owner, the services that the lifespan built."""

from typing import Annotated

from fastapi import Depends, Header, Request, Response
from sqlalchemy.orm import Session

from database import get_db
from errors import InvalidRequestError
from models import LOCAL_OWNER
from reader import Reader
from services.generation import Answer, GenerationService
from services.idempotency import Key
from services.live import Live
from services.replies import Replies
from services.streams import Streams

# With "function" the session is closed before the answer is sent, not after.
DbSession = Annotated[Session, Depends(get_db, scope="function")]


def reader_of(request: Request) -> Reader:
    """For queries of a single statement. Called, not depended on: to solve a dependency takes a
    third as long as the query."""
    reader: Reader = request.app.state.database.reader
    return reader


async def get_owner() -> str:
    """Whose rows this request may see: everybody is the machine's owner while there are no keys."""
    return LOCAL_OWNER


Owner = Annotated[str, Depends(get_owner)]


async def get_generation_service(request: Request) -> GenerationService:
    service: GenerationService = request.app.state.generation
    return service


async def get_streams(request: Request) -> Streams:
    streams: Streams = request.app.state.streams
    return streams


async def get_replies(request: Request) -> Replies:
    replies: Replies = request.app.state.replies
    return replies


async def get_key(
    request: Request,
    idempotency_key: Annotated[
        str | None,
        Header(
            max_length=255,
            description="1 to 255 printable ASCII characters of your own that name this request."
            " Asked again with them, the service does not do it again but answers what it"
            " answered.",
        ),
    ] = None,
) -> Key | None:
    if idempotency_key is None:
        return None
    if not idempotency_key.isascii() or not idempotency_key.isprintable() or not idempotency_key:
        raise InvalidRequestError("Idempotency-Key takes 1 to 255 printable ASCII characters.")
    return Key(idempotency_key, request.url.path)


def tell_replayed(response: Response, begun: Live | Answer) -> None:
    """Say in the headers that this was answered before."""
    if isinstance(begun, Answer) and begun.replayed:
        response.headers["Idempotency-Replayed"] = "true"


OnceKey = Annotated[Key | None, Depends(get_key)]
ReplyService = Annotated[Replies, Depends(get_replies)]
StreamService = Annotated[Streams, Depends(get_streams)]
Generation = Annotated[GenerationService, Depends(get_generation_service)]
