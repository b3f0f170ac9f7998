"""The same work is done once and answered from the store, on every database."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, text, update

from database import release, transaction
from models import GenerationRecord
from repositories import cached, removal
from services.cache import PREFIX, ResponseCache
from tests.database_servers import Redis
from tests.service import Server, in_process, ready, sessions_of
from tests.sse import events, text_of

BODY: dict[str, Any] = {"prompt": "Once upon a time", "max_length": 40, "use_cache": True}


@pytest.fixture
def user(request: pytest.FixtureRequest) -> str:
    """Everybody's own cache: a user of each test's own."""
    return f"user of {request.node.name}"


def generate(client: TestClient, **body: Any) -> dict[str, Any]:
    answer = client.post("/generate", json=BODY | body)
    assert answer.status_code == 200, answer.text
    record: dict[str, Any] = answer.json()
    return record


def analyze(client: TestClient, user: str, text: str, **body: Any) -> dict[str, Any]:
    answer = client.post(f"/analyze/{user}", json={"text": text} | body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def row(client: TestClient, record_id: int) -> Any:
    """What is in the table, without what the mapping makes of it."""
    with sessions_of(client)() as session:
        columns = "prompt, completion, source_id"
        sql = text(f"SELECT {columns} FROM generation_records WHERE id = :id")
        return session.execute(sql, {"id": record_id}).one()


def age(client: TestClient, record_id: int, by: timedelta) -> None:
    with sessions_of(client)() as session, transaction(session):
        session.execute(
            update(GenerationRecord)
            .where(GenerationRecord.id == record_id)
            .values(created_at=datetime.now(UTC) - by)
        )


def test_a_text_is_analyzed_once_a_day(service: TestClient, user: str) -> None:
    first = analyze(service, user, "The king was old")
    second = analyze(service, user, "The king was old")
    assert list(first) == ["id", "result", "tokens_used", "cached"]
    assert (first["cached"], second["cached"]) == (False, True)
    assert second["id"] != first["id"]
    assert second["result"] == first["result"]
    assert second["tokens_used"] == first["tokens_used"]
    age(service, first["id"], timedelta(hours=24, seconds=1))
    assert analyze(service, user, "The king was old")["cached"] is False


def test_an_analysis_is_in_its_users_history(service: TestClient, user: str) -> None:
    answers = [analyze(service, user, "The king was old") for _ in range(2)]
    found = service.get(f"/users/{user}/history").json()
    assert [record["id"] for record in found] == [answers[1]["id"], answers[0]["id"]]
    for record in found:
        assert record["prompt"] == "The king was old"
        assert record["generated_text"] == "The king was old" + answers[0]["result"]
        assert record["user_id"] == user


def test_users_do_not_share_answers(service: TestClient, user: str) -> None:
    analyze(service, user, "The king was old")
    assert analyze(service, f"{user}, too", "The king was old")["cached"] is False


def test_an_analysis_may_be_made_anew(service: TestClient, user: str) -> None:
    analyze(service, user, "The king was old")
    assert analyze(service, user, "The king was old", use_cache=False)["cached"] is False


def test_a_cached_answer_holds_no_second_copy(service: TestClient, user: str) -> None:
    first, second = generate(service, user_id=user), generate(service, user_id=user)
    assert second["cached"] is True
    assert tuple(row(service, second["id"])) == ("", "", first["id"])
    same = {"id", "created_at", "cached", "duration_ms"}
    assert {k: v for k, v in second.items() if k not in same} == {
        k: v for k, v in first.items() if k not in same
    }
    assert service.get(f"/history/{second['id']}").json() == second
    listed = service.get("/history", params={"user_id": user}).json()
    assert [item["generated_text"] for item in listed] == [first["generated_text"]] * 2


def test_a_cached_answer_is_counted(service: TestClient, user: str) -> None:
    first = generate(service, user_id=user)
    names = ("requests", "cached", "failures", "total_tokens")
    before: list[int] = []
    after: list[int] = []
    for found in (before, after):
        (sums,) = service.get("/stats", params={"bucket": "all"}).json()
        found += [sums[name] for name in names]
        generate(service, user_id=user)
    grown = [new - old for old, new in zip(before, after, strict=True)]
    assert grown == [1, 1, 0, first["total_tokens"]]


@pytest.mark.parametrize(
    "other", [{"prompt": "Once"}, {"max_length": 41}, {"temperature": 0.5}, {"seed": 1}]
)
def test_other_work_is_done(service: TestClient, user: str, other: dict[str, Any]) -> None:
    generate(service, user_id=user)
    assert generate(service, user_id=user, **other)["cached"] is False


def test_nobody_gets_a_cached_answer_unasked(service: TestClient, user: str) -> None:
    generate(service, user_id=user)
    assert generate(service, user_id=user, use_cache=False)["cached"] is False


def test_a_seed_of_ones_own_is_part_of_the_work(service: TestClient, user: str) -> None:
    first = generate(service, user_id=user, seed=3)
    second = generate(service, user_id=user, seed=3)
    assert second["cached"] is True
    assert second["generated_text"] == first["generated_text"]


def test_100_at_once_run_the_model_once(service: TestClient, user: str) -> None:
    with ThreadPoolExecutor(100) as clients:
        found = list(clients.map(lambda _: generate(service, user_id=user), range(100)))
    assert len({record["id"] for record in found}) == 100
    assert len({record["generated_text"] for record in found}) == 1
    assert sum(not record["cached"] for record in found) == 1


def test_a_stream_is_answered_from_the_store(service: TestClient, user: str) -> None:
    first = generate(service, user_id=user)
    answer = service.post("/generate/stream", json=BODY | {"user_id": user})
    sent = list(events(answer.text.splitlines()))
    assert [event.name for event in sent] == ["start", "token", "done"]
    assert BODY["prompt"] + text_of(sent) == first["generated_text"]
    assert sent[-1].data["cached"] is True


def test_a_conversations_first_message_is_answered_from_the_store(service: TestClient) -> None:
    body = {"prompt_content": "Good morning", "max_length": 40, "use_cache": True}
    said = []
    for _ in range(2):
        conversation = service.post("/conversations", json={}).json()["id"]
        url = f"/conversations/{conversation}/messages"
        said.append(service.post(url, json=body).json())
        assert service.get(url).json() == said[-1:]
    assert said[0]["response_content"] == said[1]["response_content"]
    assert row(service, said[1]["id"]).source_id == said[0]["id"]


def test_a_deleted_source_leaves_its_text_to_those_who_show_it(
    service: TestClient, user: str
) -> None:
    source, *shown = (generate(service, user_id=user) for _ in range(3))
    assert service.delete(f"/history/{source['id']}").status_code == 204
    for record in shown:
        found = service.get(f"/history/{record['id']}").json()
        assert found["generated_text"] == source["generated_text"]
    heir, other = shown
    assert row(service, other["id"]).source_id == heir["id"]
    assert generate(service, user_id=user)["cached"] is False


def test_a_deleted_conversation_leaves_its_texts_to_others(service: TestClient) -> None:
    body = {"prompt_content": "Good evening", "max_length": 40, "use_cache": True}
    first, second = (service.post("/conversations", json={}).json()["id"] for _ in range(2))
    said = [
        service.post(f"/conversations/{place}/messages", json=body).json()
        for place in (first, second)
    ]
    assert service.delete(f"/conversations/{first}").status_code == 204
    kept = service.get(f"/messages/{said[1]['id']}").json()
    assert kept["response_content"] == said[0]["response_content"]


def test_a_corrected_message_changes_no_other_answer(service: TestClient) -> None:
    body = {"prompt_content": "Good night", "max_length": 40, "use_cache": True}
    places = [service.post("/conversations", json={}).json()["id"] for _ in range(3)]
    urls = [f"/conversations/{place}/messages" for place in places]
    source, shown = (service.post(url, json=body).json() for url in urls[:2])
    service.put(f"/messages/{source['id']}", json={"response_content": "No."})
    kept = service.get(f"/messages/{shown['id']}").json()
    assert kept["response_content"] == source["response_content"]
    assert service.post(urls[2], json=body).json()["response_content"] != "No."
    service.put(f"/messages/{shown['id']}", json={"response_content": "Yes."})
    assert service.get(f"/messages/{shown['id']}").json()["response_content"] == "Yes."


def said_in(client: TestClient, **body: Any) -> dict[str, Any]:
    """A message in a conversation of its own."""
    conversation = client.post("/conversations", json={"title": "Tales"}).json()["id"]
    answer = client.post(f"/conversations/{conversation}/messages", json=body)
    assert answer.status_code == 201, answer.text
    message: dict[str, Any] = answer.json()
    return message


def told(client: TestClient, message: dict[str, Any]) -> tuple[str, str]:
    """What a message says when it is read again."""
    found = client.get(f"/messages/{message['id']}").json()
    return found["prompt_content"], found["response_content"]


def cache_of(client: TestClient) -> ResponseCache:
    cache: ResponseCache = client.app.state.generation.cache  # type: ignore[attr-defined]
    return cache


def test_an_answer_that_is_corrected_while_it_is_looked_up_is_made_anew(
    service: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"prompt_content": "Good noon", "max_length": 40, "use_cache": True}
    source = said_in(service, **body)
    cache = cache_of(service)
    find = cache.find

    def find_then_correct(*looked_up: Any) -> GenerationRecord | None:
        found = find(*looked_up)
        change = {"prompt_content": "Corrected", "response_content": "By hand"}
        service.put(f"/messages/{source['id']}", json=change)
        return found

    monkeypatch.setattr(cache, "find", find_then_correct)
    answer = said_in(service, **body)
    assert told(service, answer) == ("Good noon", answer["response_content"])
    assert told(service, source) == ("Corrected", "By hand")


def test_an_answer_waits_for_a_correction_that_is_not_committed_yet(service: TestClient) -> None:
    body = {"prompt_content": "Good dusk", "max_length": 40, "use_cache": True}
    source = said_in(service, **body)
    with ThreadPoolExecutor(1) as pool:
        with sessions_of(service)() as session, transaction(session):
            record = session.get_one(GenerationRecord, source["id"])
            removal.separate(session, record)
            record.own_prompt, record.own_completion = "Corrected", "By hand"
            session.flush()
            asked = pool.submit(said_in, service, **body)
            time.sleep(0.5)
        answer = asked.result()
    assert told(service, answer) == ("Good dusk", answer["response_content"])


def test_a_correction_waits_for_an_answer_that_is_not_committed_yet(service: TestClient) -> None:
    body = {"prompt_content": "Good dawn", "max_length": 40, "use_cache": True}
    source = said_in(service, **body)
    now = datetime.now(UTC)
    with ThreadPoolExecutor(1) as pool:
        with sessions_of(service)() as session:
            found = session.get_one(GenerationRecord, source["id"])
            release(session)
            with transaction(session):
                assert cached.hold(session, "local", found.id, found.cache_key or "")
                shown = cached.add(
                    session, "local", found, created_at=now, updated_at=now, conversation_id=None
                )
                change = {"response_content": "By hand"}
                put = pool.submit(service.put, f"/messages/{source['id']}", json=change)
                time.sleep(0.5)
        assert put.result().is_success
    kept = service.get(f"/history/{shown.id}").json()
    assert kept["generated_text"] == "Good dawn" + source["response_content"]


def test_a_cached_answer_is_replayed_like_its_source(service: TestClient, user: str) -> None:
    generate(service, user_id=user)
    second = generate(service, user_id=user)
    answer = service.post(f"/history/{second['id']}/replay").json()
    assert answer["result"] == "identical"


def test_a_lifetime_of_zero_turns_the_cache_off(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'records.db'}"
    with in_process(DATABASE_URL=url, CACHE_TTL_SECONDS="0") as client:
        ready(client)
        assert [generate(client)["cached"] for _ in range(2)] == [False, False]


def test_processes_do_the_same_work_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'records.db'}"
    servers = [Server({"DATABASE_URL": url}, tmp_path / f"log {number}") for number in range(2)]
    try:
        places = [server.wait_until_ready().url for server in servers] * 10
        body = BODY | {"max_length": 100}
        with ThreadPoolExecutor(len(places)) as clients:
            answers = list(
                clients.map(
                    lambda place: httpx.post(f"{place}/generate", json=body, timeout=60), places
                )
            )
    finally:
        for server in servers:
            server.kill()
    found = [answer.raise_for_status().json() for answer in answers]
    assert len({record["generated_text"] for record in found}) == 1
    assert sum(not record["cached"] for record in found) == 1


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[tuple[Redis, TestClient]]:
    server = Redis()
    url = f"sqlite:///{tmp_path / 'records.db'}"
    try:
        with in_process(DATABASE_URL=url, REDIS_URL=server.url) as client:
            yield server, ready(client)
    finally:
        server.stop()


def pointers(server: Redis) -> list[Any]:
    keys: Any = server.client.keys(PREFIX + "*")
    return list(keys)


def test_redis_points_at_records_and_holds_no_text(shared: tuple[Redis, TestClient]) -> None:
    server, client = shared
    first = generate(client)
    assert generate(client)["cached"] is True
    (key,) = pointers(server)
    assert server.client.get(key) == str(first["id"]).encode()
    assert generate(client)["generated_text"] == first["generated_text"]


@pytest.mark.parametrize("lie", [b"garbage", b"999999999999999999999", b"-1", b"\xff", b"another"])
def test_what_redis_says_is_checked(shared: tuple[Redis, TestClient], lie: bytes) -> None:
    server, client = shared
    first, other = generate(client), generate(client, prompt="There was a king")
    generate(client)
    (key,) = pointers(server)
    server.client.set(key, other["id"] if lie == b"another" else lie)
    again = generate(client)
    assert again["generated_text"] == first["generated_text"]
    assert again["cached"] is True


def test_a_key_of_another_kind_costs_nothing(shared: tuple[Redis, TestClient]) -> None:
    server, client = shared
    first = generate(client)
    generate(client)
    (key,) = pointers(server)
    server.client.delete(key)
    server.client.lpush(key, "a list")
    assert generate(client)["generated_text"] == first["generated_text"]


def test_without_its_redis_the_service_goes_on_and_warns_once(
    shared: tuple[Redis, TestClient], caplog: pytest.LogCaptureFixture
) -> None:
    server, client = shared
    generate(client)
    server.stop()
    began = time.monotonic()
    assert [generate(client)["cached"] for _ in range(5)] == [True] * 5
    assert time.monotonic() - began < 30
    warned = [line for line in caplog.messages if line.startswith("redis does not answer")]
    assert len(warned) == 1


def test_every_record_of_the_cache_points_at_one_with_a_text(service: TestClient) -> None:
    with sessions_of(service)() as session:
        column = GenerationRecord.source_id
        sources = list(session.scalars(select(column).where(column.is_not(None))))
        found = session.scalars(
            select(GenerationRecord).where(GenerationRecord.id.in_(sources))
        ).all()
    assert sources
    # An answer may be empty, a prompt may not.
    assert all(record.source_id is None and record.own_prompt for record in found)
