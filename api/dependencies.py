"""What routes ask for: a session, the owner, the services that the lifespan built."""

from typing import Annotated

from fastapi import Depends, Request
from sqlalchemy.orm import Session

from database import get_db
from models import LOCAL_OWNER
from services.conversations import Replies
from services.generation import GenerationService
from services.streams import Streams

# With "function" the session is closed before the answer is sent, not after.
DbSession = Annotated[Session, Depends(get_db, scope="function")]


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


ReplyService = Annotated[Replies, Depends(get_replies)]
StreamService = Annotated[Streams, Depends(get_streams)]
Generation = Annotated[GenerationService, Depends(get_generation_service)]
