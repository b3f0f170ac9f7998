"""Three other ways to answer a read, for `benchmarks.reads` to compare with, on DATABASE_URL.

* `/constant/{id}`: a route that returns a constant, on a bare FastAPI.
* The book chapter's way: an async SQLAlchemy session a request, psycopg, a repository class.
* The first guide's way: a synchronous query inside ``async def``, a session a request.

The rows are the service's own, so that each does the same work.
"""

import os
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException
from sqlalchemy import create_engine, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from connections import normalise_url
from models import Conversation, ConversationOut, GenerationRecord, Record

URL = normalise_url(os.environ["DATABASE_URL"])
CONSTANT = {
    "id": 1,
    "title": "A conversation",
    "model_type": "tiny-gpt2",
    "created_at": "2026-01-01T12:00:00.123456Z",
    "updated_at": "2026-01-01T12:00:00.123456Z",
}
app = FastAPI()


@app.get("/constant/{id}")
async def constant() -> dict[str, Any]:
    return CONSTANT


if URL.get_backend_name() == "postgresql":
    async_sessions = async_sessionmaker(create_async_engine(URL), expire_on_commit=False)

    async def get_async_session() -> AsyncIterator[AsyncSession]:
        async with async_sessions() as session:
            yield session

    BookSession = Annotated[AsyncSession, Depends(get_async_session)]

    class Repository:
        def __init__(self, session: AsyncSession) -> None:
            self.session = session

        async def get(self, table: type[Any], id: int) -> Any:
            result = await self.session.execute(select(table).where(table.id == id))
            if (found := result.scalars().first()) is None:
                raise HTTPException(404, "not found")
            return found

    @app.get("/history/{id}", response_model=Record)
    async def book_record(id: int, session: BookSession) -> Any:
        return await Repository(session).get(GenerationRecord, id)

    @app.get("/conversations/{id}", response_model=ConversationOut)
    async def book_conversation(id: int, session: BookSession) -> Any:
        return await Repository(session).get(Conversation, id)

else:
    sessions = sessionmaker(create_engine(URL, connect_args={"check_same_thread": False}))

    def get_session() -> Iterator[Session]:
        session = sessions()
        try:
            yield session
        finally:
            session.close()

    GuideSession = Annotated[Session, Depends(get_session)]

    @app.get("/history/{id}", response_model=Record)
    async def guide_record(id: int, session: GuideSession) -> Any:
        found = session.query(GenerationRecord).filter(GenerationRecord.id == id).first()
        if found is None:
            raise HTTPException(404, "not found")
        return found

    @app.get("/conversations/{id}", response_model=ConversationOut)
    async def guide_conversation(id: int, session: GuideSession) -> Any:
        found = session.query(Conversation).filter(Conversation.id == id).first()
        if found is None:
            raise HTTPException(404, "not found")
        return found
