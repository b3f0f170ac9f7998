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
from datetime import timedelta

import anyio.to_thread
import uvicorn
from fastapi import FastAPI, Request, Response

import log
from api import conversations, operations, streams
from api import history as history_routes
from api.dependencies import DbSession, Generation, OnceKey, Owner, reader_of, tell_replayed
from api.errors import add_handlers, responses
from api.history import RecordId
from api.middleware import BodyLimit, OneLineStartError, RequestContext, SlowReaderLimit
from api.shapes import shaped
from database import Database
from errors import StartError
from models import GenerateRequest, Record
from services import history
from services.cache import ResponseCache
from services.checkpoints import CHECKPOINT_SECONDS, Checkpointer
from services.content_filter import ContentFilter
from services.drain import Drain
from services.generation import GenerationService
from services.leases import LeaseKeeper
from services.live import LiveGenerations
from services.model_host import WATCH_SECONDS, ModelHost
from services.replies import Replies
from services.retention import RETENTION_SECONDS, Retention
from services.statistics import FOLD_SECONDS, UsageFolder
from services.streams import Streams
from services.ticker import Ticker
from services.titles import TITLE_SECONDS, Titler
from settings import load_settings

# Python lets a thread that computes go on for 5 ms while others wait, which the model's thread
# does: each of a commit's statements then waits as long. At 0.5 ms 32 clients got some 10 % more
# tokens a second; at 0.1 ms fewer.
SWITCH_SECONDS = 0.0005

# Of the request threads, one in so many may wait for another request of the same conversation, key
# or work: with the other settings as they come, a full queue and all who may wait leave threads for
# the rest.
WAITING_SHARE = 4


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Build everything once, hand it to the routes on ``app.state``, and take it down again."""
    settings = load_settings()
    log.configure(settings.log_format, settings.log_level)
    sys.setswitchinterval(SWITCH_SECONDS)
    anyio.to_thread.current_default_thread_limiter().total_tokens = settings.request_threads
    database = Database(
        settings.database_url,
        settings.database_timeout_seconds,
        settings.database_pool_size,
        settings.database_unsafe_commits,
    )
    database.open()
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
        ResponseCache(
            database, live, timedelta(seconds=settings.cache_ttl_seconds), settings.redis_url
        ),
        settings.request_timeout_seconds,
        timedelta(hours=settings.idempotency_hours),
        settings.request_threads // WAITING_SHARE,
    )
    app.state.replies = Replies(generation)
    app.state.streams = Streams(database, live)
    checkpointer = Checkpointer(database, live, generation)
    retention = Retention(database, settings.retention_days, settings.retention_body_days)
    tickers = [
        Ticker("checkpoints", CHECKPOINT_SECONDS, checkpointer.tick),
        Ticker("titles", TITLE_SECONDS, Titler(database, models).tick),
        Ticker("statistics", FOLD_SECONDS, UsageFolder(database).tick),
        Ticker("retention", RETENTION_SECONDS, retention.tick),
        Ticker("watchdog", WATCH_SECONDS, models.check),
    ]
    for ticker in tickers:
        ticker.start()

    def close() -> None:
        retention.stop()
        for ticker in tickers:
            ticker.stop()
        generation.finisher.store_unstored()  # what is left open is closed with the lease
        lease.stop()
        database.close()

    drain = Drain(models, live, settings.drain_seconds, close)
    drain.install()
    yield
    await anyio.to_thread.run_sync(drain.finish)
    drain.uninstall()
    close()


def stop_process() -> None:
    """Let the server shut down in order. The drain sees to it that the exit status is 1."""
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


@app.post("/generate", response_model=Record, responses=responses(400, 409, 413, 500, 503, 504))
def generate(
    request: GenerateRequest,
    session: DbSession,
    owner: Owner,
    service: Generation,
    key: OnceKey,
) -> Response:
    """Continue a prompt. The record is stored before it is answered."""
    answer = service.generate(session, owner, request, key)
    response = shaped(Record.model_validate(answer.record))
    tell_replayed(response, answer)
    return response


@app.get("/history/{record_id}", response_model=Record, responses=responses(404, 503))
async def get_record(record_id: RecordId, request: Request, owner: Owner) -> Response:
    """One record, as it was answered."""
    return shaped(await history.read(reader_of(request), owner, record_id))


# Tried in this order, each route costing a little: what is asked most comes first.
app.include_router(conversations.router)
app.include_router(history_routes.router)
app.include_router(streams.router)
app.include_router(operations.router)


if __name__ == "__main__":
    serve()
