"""What runs is written down: what somebody has seen at once, what nobody has seen now and then."""

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
from fastapi.testclient import TestClient

from database import release, transaction
from engine.engine import Engine
from engine.loading import load_model
from engine.sampling import FinishReason
from models import TERMINAL, GenerateRequest, GenerationRecord, Status
from repositories import records, removal
from services import checkpoints
from services.checkpoints import UNSEEN_SECONDS, is_due
from services.finishing import Finisher
from services.generation import GenerationService
from services.live import Live, LiveGenerations
from tests.engine.conftest import TINY, greedy
from tests.service import sessions_of
from tests.sse import Event, events
from tests.test_finishing import wait_for
from tests.test_history import OWNER, insert

BODY = {"prompt": "Once upon a time", "max_length": 200, "seed": 7}
OTHERS = 100


def test_a_text_that_nobody_has_seen_is_written_less_often() -> None:
    live = Live(GenerationRecord(), cast(Any, None), finish_alone=True, deadline=0)
    assert not is_due(live)
    live.checkpointed_at -= UNSEEN_SECONDS
    assert is_due(live)


def test_a_text_that_somebody_has_seen_is_written_each_time() -> None:
    engine = Engine(load_model(TINY, "float32", "cpu"))
    try:
        generation = engine.admit(engine.loaded.encode("Once upon a time"), greedy(20))
        live = Live(GenerationRecord(), generation, finish_alone=True, deadline=0)
        generation.start()
        generation.result(60)
        asyncio.run(one_look(live))
        assert is_due(live)
    finally:
        engine.close(10)


class Followed:
    """A stream that takes seconds, for much is to be generated before it."""

    def __init__(self, service: TestClient, path: str, body: dict[str, Any]) -> None:
        self.service, self.live = service, live_of(service)
        others = GenerateRequest.model_validate(BODY)
        with sessions_of(service)() as session:
            generation: GenerationService = service.app.state.generation  # type: ignore[attr-defined]
            self.others = [generation.stream(session, OWNER, others, True) for _ in range(OTHERS)]
        self.pool = ThreadPoolExecutor(1)
        self.last_event = self.pool.submit(self.follow, path, body)
        wait_for(lambda: len(self.live.all()) > OTHERS)
        self.id = max(live.record.id for live in self.live.all())
        self.generation = self.live.by_record[self.id].generation

    def follow(self, path: str, body: dict[str, Any]) -> Event:
        answer = self.service.post(path, json=body)
        return list(events(answer.text.splitlines()))[-1]

    def row(self) -> GenerationRecord:
        with sessions_of(self.service)() as session:
            return session.get_one(GenerationRecord, self.id)

    def was_stopped(self) -> bool:
        """Once it has ended: whether the model was stopped before it was done."""
        wait_for(lambda: self.live.get(OWNER, self.id) is None)
        return self.generation.snapshot().finish_reason is FinishReason.CANCELLED

    def end_others(self) -> None:
        for live in self.live.all():
            if live.generation is not self.generation:
                live.generation.cancel()

    def end(self) -> None:
        self.end_others()
        self.generation.cancel()
        self.last_event.result()
        self.live.wait_until_none(20)


def live_of(service: TestClient) -> LiveGenerations:
    live: LiveGenerations = service.app.state.generation.live  # type: ignore[attr-defined]
    return live


@pytest.fixture
def followed(service: TestClient) -> Iterator[Followed]:
    begun = Followed(service, "/generate/stream", BODY)
    yield begun
    begun.end()


@pytest.fixture
def refused(service: TestClient) -> Iterator[None]:
    """An ending that the database does not take, today nor tomorrow."""
    finisher: Finisher = service.app.state.generation.finisher  # type: ignore[attr-defined]
    with sessions_of(service)() as session:
        record = session.get_one(GenerationRecord, insert(session, status=Status.IN_PROGRESS))
        release(session)
    finisher.unstored.append((record, {"model_name": None}))
    yield
    assert finisher.unstored
    finisher.unstored.clear()


def test_a_text_is_in_its_row_before_its_end(refused: None, followed: Followed) -> None:
    seen: list[GenerationRecord] = []

    def is_kept() -> bool:
        time.sleep(0.05)  # or looking would take the time of what is looked for
        seen.append(followed.row())
        return seen[-1].completion != "" or seen[-1].status in TERMINAL

    wait_for(is_kept)
    early = seen[-1]
    assert (early.status, early.completion != "") == (Status.IN_PROGRESS, True)
    assert early.completion_tokens > 0
    followed.end_others()
    done = followed.last_event.result()
    assert done.data["generated_text"].startswith(early.prompt + early.completion)


def test_what_another_process_cancels_ends_here(refused: None, followed: Followed) -> None:
    with sessions_of(followed.service)() as session, transaction(session):
        records.request_cancel(session, OWNER, followed.id)
    assert followed.was_stopped()
    assert followed.last_event.result().data["code"] == "cancelled"
    assert (followed.row().status, followed.row().finish_reason) == ("cancelled", "cancelled")


def test_what_another_process_deletes_ends_here(followed: Followed) -> None:
    with sessions_of(followed.service)() as session, transaction(session):
        assert removal.remove(session, OWNER, followed.id)
    assert followed.was_stopped()
    assert followed.last_event.result().data["code"] == "conflict"


@pytest.mark.parametrize("path", ["history/{message}", "messages/{message}", "conversations/{id}"])
def test_what_is_deleted_here_ends_before_a_checkpoint(
    service: TestClient, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", 1000)
    conversation = service.post("/conversations", json={"title": "Kings"}).json()["id"]
    body = {"prompt_content": "Who was the king?", "max_length": 200}
    followed = Followed(service, f"/conversations/{conversation}/messages/stream", body)
    try:
        deleted = service.delete("/" + path.format(message=followed.id, id=conversation))
        assert deleted.status_code == 204
        assert followed.was_stopped()
        assert followed.last_event.result().data["code"] == "conflict"
    finally:
        followed.end()


async def one_look(live: Live) -> None:
    pieces = live.follow(0)
    assert await anext(pieces)
    await pieces.aclose()


def test_a_retry_that_runs_before_its_first_try_is_forgotten_stays_known() -> None:
    """A first try's end is in the row, and a retry with its key runs there, for a moment before."""

    async def scenario() -> None:
        known = LiveGenerations(asyncio.get_running_loop())
        record = GenerationRecord(id=1, owner_id=OWNER)
        first, second = (
            Live(record, cast(Any, object()), finish_alone=True, deadline=0) for _ in range(2)
        )
        known.add(first)
        known.add(second)
        known.end(first, record)
        assert known.all() == [second]
        known.end(second, record)
        assert known.all() == []

    asyncio.run(scenario())
