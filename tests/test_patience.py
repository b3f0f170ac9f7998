"""A request's waits share one deadline, and no more requests wait than there are places."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from errors import OverloadedError
from services.generation import GenerationService
from services.live import Live
from services.patience import Patience
from services.turns import Turns
from tests.service import in_process, ready

KEY = {"Idempotency-Key": "mine"}
LINE = "local mine"
WAITED = 0.3


def test_only_who_waits_takes_a_place_and_keeps_it() -> None:
    places = threading.Semaphore(1)
    with Patience(20, places), Patience(20, places) as waiting:
        assert waiting.to_wait() > 0
        assert waiting.to_wait() > 0
        with Patience(20, places) as refused, pytest.raises(OverloadedError):
            refused.to_wait()
    with Patience(20, places) as waiting:
        assert waiting.to_wait() > 0


def test_no_time_is_left_after_the_deadline() -> None:
    assert Patience(0, threading.Semaphore()).left() == 0


@pytest.fixture
def service(tmp_path: Path) -> Iterator[TestClient]:
    """Of 12 request threads 3 may wait."""
    url = f"sqlite:///{tmp_path / 'records.db'}"
    with in_process(DATABASE_URL=url, REQUEST_THREADS="12", DATABASE_POOL_SIZE="12") as client:
        yield ready(client)


def generation_of(client: TestClient) -> GenerationService:
    service: GenerationService = client.app.state.generation  # type: ignore[attr-defined]
    return service


def replies_turns_of(client: TestClient) -> Turns:
    turns: Turns = client.app.state.replies.turns  # type: ignore[attr-defined]
    return turns


def wait_for_line(turns: Turns, name: str, count: int) -> None:
    deadline = time.monotonic() + 20
    while len(turns.lines.get(name, ())) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("kind", ["key", "conversation"])
def test_what_was_waited_is_missing_from_the_time_to_generate(
    service: TestClient, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    generation = generation_of(service)
    conversation = service.post("/conversations", json={"title": "One"}).json()["id"]
    url, field, turns, line = {
        "key": ("/generate", "prompt", generation.turns, LINE),
        "conversation": (
            f"/conversations/{conversation}/messages",
            "prompt_content",
            replies_turns_of(service),
            f"local {conversation}",
        ),
    }[kind]
    begun: list[Live] = []
    add = generation.live.add

    def note(live: Live) -> None:
        begun.append(live)
        add(live)

    monkeypatch.setattr(generation.live, "add", note)
    with ThreadPoolExecutor(1) as other:
        with Patience(20, threading.Semaphore()) as mine, turns.of(line, mine):
            answer = other.submit(service.post, url, json={field: "Hello"}, headers=KEY)
            wait_for_line(turns, line, 2)
            time.sleep(WAITED)
        assert answer.result().is_success
    (live,) = begun
    assert live.deadline - live.began <= generation.timeout - WAITED


def test_no_more_wait_for_a_key_than_leave_threads_for_others(service: TestClient) -> None:
    turns = generation_of(service).turns
    body = {"prompt": "Once upon a time", "max_length": 20}
    with ThreadPoolExecutor(10) as others:
        with Patience(20, threading.Semaphore()) as mine, turns.of(LINE, mine):
            asked = [
                others.submit(service.post, "/generate", json=body, headers=KEY) for _ in range(10)
            ]
            answered = as_completed(asked, timeout=20)
            refused = [next(answered).result() for _ in range(7)]
        assert [answer.status_code for answer in refused] == [503] * 7
        assert {answer.json()["code"] for answer in refused} == {"overloaded"}
        waited = [future.result() for future in answered]
    assert {answer.status_code for answer in waited} <= {200, 409}
    assert 200 in [answer.status_code for answer in waited]
