"""The AI Database Service: text generation that never forgets.

This module is the app: what the lifespan builds, the two headline routes, and what else is
included. Importing it loads no model, opens no database and starts no thread.
"""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio.to_thread
import uvicorn
from fastapi import FastAPI

import log
from api import conversations, operations, streams
from api import history as history_routes
from api.dependencies import DbSession, Generation, Owner
from api.errors import add_handlers, responses
from api.history import RecordId
from api.middleware import BodyLimit, OneLineStartError, RequestContext, SlowReaderLimit
from database import Database
from errors import StartError
from models import GenerateRequest, GenerationRecord, Record
from services import history
from services.checkpoints import CHECKPOINT_SECONDS, Checkpointer
from services.content_filter import ContentFilter
from services.conversations import Replies
from services.drain import Drain
from services.generation import GenerationService
from services.leases import LeaseKeeper
from services.live import LiveGenerations
from services.model_host import WATCH_SECONDS, ModelHost
from services.streams import Streams
from services.ticker import Ticker
from services.titles import TITLE_SECONDS, Titler
from settings import load_settings


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Build everything once, hand it to the routes on ``app.state``, and take it down again."""
    settings = load_settings()
    log.configure(settings.log_format, settings.log_level)
    anyio.to_thread.current_default_thread_limiter().total_tokens = settings.request_threads
    database = Database(settings.database_url, settings.database_timeout_seconds)
    database.migrate()
    lease = LeaseKeeper(database)
    lease.start()
    live = LiveGenerations(asyncio.get_running_loop())
    models = ModelHost(
        settings.model,
        settings.dtype,
        settings.device,
        settings.max_waiting,
        stop_process,
        live.on_step,
    )
    models.start()
    app.state.database, app.state.lease, app.state.models = database, lease, models
    app.state.settings = settings
    app.state.generation = generation = GenerationService(
        database,
        models,
        ContentFilter(settings.forbidden_words),
        lease,
        live,
        settings.request_timeout_seconds,
    )
    app.state.replies = Replies(generation)
    app.state.streams = Streams(database, live)
    checkpointer = Checkpointer(database, lease, live, generation)
    tickers = [
        Ticker("checkpoints", CHECKPOINT_SECONDS, checkpointer.tick),
        Ticker("titles", TITLE_SECONDS, Titler(database, models).tick),
        Ticker("watchdog", WATCH_SECONDS, models.check),
    ]
    for ticker in tickers:
        ticker.start()

    def close() -> None:
        for ticker in tickers:
            ticker.stop()
        lease.stop()
        database.close()

    drain = Drain(models, live, settings.drain_seconds, close)
    drain.install()
    yield
    await anyio.to_thread.run_sync(drain.finish)
    drain.uninstall()
    close()


def stop_process() -> None:
    """Let the server shut down in order; its exit status says that it was not asked to."""
    os.kill(os.getpid(), signal.SIGTERM)


def serve() -> None:
    """`make run`: uvicorn on the settings' address."""
    try:
        settings = load_settings()
    except StartError as error:
        sys.exit(str(error))
    uvicorn.run("main:app", host=settings.host, port=settings.port)


app = FastAPI(
    title="AI Database Service",
    description="Text generation that never forgets: every prompt and output is kept.",
    version="0.1.0",
    lifespan=lifespan,
)
add_handlers(app)
app.add_middleware(BodyLimit)
app.add_middleware(SlowReaderLimit)
app.add_middleware(RequestContext)
app.add_middleware(OneLineStartError)


@app.post("/generate", response_model=Record, responses=responses(400, 413, 500, 503, 504))
def generate(
    request: GenerateRequest, session: DbSession, owner: Owner, service: Generation
) -> GenerationRecord:
    """Continue a prompt. The record is stored before it is answered."""
    return service.generate(session, owner, request)


@app.get("/history/{record_id}", response_model=Record, responses=responses(404, 503))
def get_record(record_id: RecordId, session: DbSession, owner: Owner) -> GenerationRecord:
    """One record, as it was answered."""
    return history.get(session, owner, record_id)


app.include_router(history_routes.router)
app.include_router(streams.router)
app.include_router(conversations.router)
app.include_router(operations.router)


if __name__ == "__main__":
    serve()
