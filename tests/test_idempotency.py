"""Asked twice with one Idempotency-Key, done once; on every database."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from database import transaction
from models import FinishReason, GenerationRecord, Status
from repositories import keys, removal
from tests.service import sessions_of
from tests.sse import Event, events, text_of

BODY: dict[str, Any] = {"prompt": "Once upon a time", "max_length": 30}
ROUTES = ["/generate", "/generate/stream"]


@pytest.fixture
def key(request: pytest.FixtureRequest) -> str:
    return f"key of {request.node.name}"


def post(client: TestClient, key: str, route: str = "/generate", **body: Any) -> Any:
    return client.post(route, json=BODY | body, headers={"Idempotency-Key": key})


def stream(client: TestClient, key: str) -> tuple[Any, list[Event]]:
    answer = post(client, key, "/generate/stream")
    return answer, list(events(answer.text.splitlines()))


def stored(client: TestClient, key: str) -> list[GenerationRecord]:
    with sessions_of(client)() as session:
        found = session.query(GenerationRecord).where(GenerationRecord.idempotency_key == key)
        return list(found)


def rewrite(client: TestClient, record_id: int, **values: Any) -> None:
    with sessions_of(client)() as session, transaction(session):
        session.execute(
            update(GenerationRecord).where(GenerationRecord.id == record_id).values(**values)
        )


def test_the_same_request_gets_the_same_record(service: TestClient, key: str) -> None:
    first, second = post(service, key), post(service, key)
    assert second.status_code == 200
    assert second.json() == first.json()
    assert "Idempotency-Replayed" not in first.headers
    assert second.headers["Idempotency-Replayed"] == "true"
    assert len(stored(service, key)) == 1


@pytest.mark.parametrize("route", ROUTES)
def test_another_request_with_the_key_is_422(service: TestClient, key: str, route: str) -> None:
    post(service, key)
    answer = post(service, key, route, prompt="There was a king")
    assert answer.status_code == 422
    assert answer.json()["code"] == "idempotency_key_reused"


def test_the_key_on_another_route_is_422(service: TestClient, key: str) -> None:
    post(service, key)
    assert post(service, key, "/generate/stream").status_code == 422


def test_requests_at_once_are_done_once(service: TestClient, key: str) -> None:
    with ThreadPoolExecutor(10) as clients:
        answers = list(clients.map(lambda _: post(service, key, max_length=120), range(10)))
    done = [answer.json() for answer in answers if answer.status_code == 200]
    assert done
    assert all(record == done[0] for record in done)
    for answer in answers:
        if answer.status_code != 200:
            assert answer.status_code == 409
            assert answer.json()["code"] == "idempotency_key_in_use"
            assert int(answer.headers["Retry-After"]) >= 1
    assert [record.attempts for record in stored(service, key)] == [1]


@pytest.mark.parametrize("reason", [FinishReason.INTERRUPTED, FinishReason.DISCONNECTED])
def test_a_first_try_that_was_cut_short_is_run_again_on_its_row(
    service: TestClient, key: str, reason: FinishReason
) -> None:
    first = post(service, key).json()
    rewrite(
        service, first["id"], status=Status.INCOMPLETE, finish_reason=reason, completion=" there"
    )
    again = post(service, key)
    assert "Idempotency-Replayed" not in again.headers
    assert again.json()["id"] == first["id"]
    assert again.json()["generated_text"] == first["generated_text"]  # its seed was kept
    assert [record.attempts for record in stored(service, key)] == [2]


def test_one_that_was_cancelled_stays_cancelled(service: TestClient, key: str) -> None:
    first = post(service, key).json()
    rewrite(service, first["id"], status=Status.CANCELLED, finish_reason=FinishReason.CANCELLED)
    answer = post(service, key)
    assert answer.status_code == 409
    assert answer.json()["code"] == "cancelled"
    assert answer.json()["id"] == first["id"]


def test_a_stream_replays_its_events(service: TestClient, key: str) -> None:
    first, sent = stream(service, key)
    second, again = stream(service, key)
    assert "Idempotency-Replayed" not in first.headers
    assert second.headers["Idempotency-Replayed"] == "true"
    assert again[0] == sent[0]
    assert again[-1] == sent[-1]
    assert again[-1].name == "done"
    assert text_of(again) == text_of(sent)


def test_a_key_expires(service: TestClient, key: str) -> None:
    first = post(service, key).json()
    rewrite(service, first["id"], created_at=datetime.now(UTC) - timedelta(hours=24, minutes=1))
    second = post(service, key)
    assert second.json()["id"] != first["id"]
    assert [record.id for record in stored(service, key)] == [second.json()["id"]]


def test_a_deleted_record_frees_its_key(service: TestClient, key: str) -> None:
    first = post(service, key).json()
    service.delete(f"/history/{first['id']}")
    assert post(service, key).json()["id"] != first["id"]


def messages_of_a_conversation(client: TestClient) -> str:
    conversation = client.post("/conversations", json={"title": "Kings"}).json()["id"]
    return f"/conversations/{conversation}/messages"


def say(client: TestClient, url: str, key: str) -> Any:
    body = {"prompt_content": "Hello", "max_length": 20}
    return client.post(url, json=body, headers={"Idempotency-Key": key})


def cut_short(client: TestClient, record_id: int) -> None:
    rewrite(client, record_id, status=Status.INCOMPLETE, finish_reason=FinishReason.INTERRUPTED)


def test_a_message_is_said_once(service: TestClient, key: str) -> None:
    url = messages_of_a_conversation(service)
    first, second = (say(service, url, key) for _ in range(2))
    assert first.status_code == second.status_code == 201
    assert first.json() == second.json()
    assert service.get(url).json() == [first.json()]


def test_a_message_that_was_cut_short_is_answered_in_its_place(
    service: TestClient, key: str
) -> None:
    url = messages_of_a_conversation(service)
    first = say(service, url, key).json()
    later = service.post(url, json={"prompt_content": "And then?"}).json()
    cut_short(service, first["id"])
    again = say(service, url, key).json()
    assert again["response_content"] == first["response_content"]
    assert [message["id"] for message in service.get(url).json()] == [first["id"], later["id"]]


def test_a_message_that_was_cut_short_and_then_corrected_keeps_the_correction(
    service: TestClient, key: str
) -> None:
    url = messages_of_a_conversation(service)
    first = say(service, url, key).json()
    cut_short(service, first["id"])
    path = f"/messages/{first['id']}"
    corrected = service.put(path, json={"response_content": "Good day."}).json()
    assert say(service, url, key).json()["id"] == first["id"]
    assert service.get(path).json() == corrected


def test_a_text_that_retention_took_is_there_again(service: TestClient, key: str) -> None:
    first = post(service, key).json()
    cut_short(service, first["id"])
    with sessions_of(service)() as session, transaction(session):
        removal.remove_texts(session, [first["id"]], datetime.now(UTC))
    again = post(service, key).json()
    assert again["generated_text"] == first["generated_text"]
    assert again["text_removed_at"] is None
    assert service.get(f"/history/{first['id']}").json() == again


def test_a_second_try_in_another_thread_is_other_work(service: TestClient, key: str) -> None:
    body = {"prompt_content": "Who was it?", "max_length": 30, "use_cache": True}
    anna, fisher = f"Anna {key}", f"The old fisherman {key}"

    def told(name: str) -> tuple[str, int]:
        """A thread that begins with an answer that was given."""
        conversation = service.post("/conversations", json={"title": "Names"}).json()["id"]
        url = f"/conversations/{conversation}/messages"
        given = {"prompt_content": "Who are you?", "response_content": name}
        return url, service.post(url, json=given).json()["id"]

    def is_cached(url: str) -> bool:
        said = service.post(url, json=body).json()
        return bool(service.get(f"/history/{said['id']}").json()["cached"])

    url, before = told(anna)
    headers = {"Idempotency-Key": key}
    cut_short(service, service.post(url, json=body, headers=headers).json()["id"])
    service.put(f"/messages/{before}", json={"response_content": fisher})
    service.post(url, json=body, headers=headers)
    assert not is_cached(told(anna)[0])
    assert is_cached(told(fisher)[0])


def test_an_exchange_is_kept_once(service: TestClient, key: str) -> None:
    url, headers = messages_of_a_conversation(service), {"Idempotency-Key": key}
    body = {"prompt_content": "Hello", "response_content": "Good day."}
    first, second = (service.post(url, json=body, headers=headers) for _ in range(2))
    assert first.json() == second.json()
    assert second.headers["Idempotency-Replayed"] == "true"


@pytest.mark.parametrize("bad", ["", "k" * 256, "kéy", "a\tb"])
def test_a_key_is_1_to_255_printable_characters(client: TestClient, bad: str) -> None:
    headers = {b"Idempotency-Key": bad.encode("latin-1")}
    assert client.post("/generate", json=BODY, headers=headers).status_code == 422


def test_keys_of_two_owners_do_not_meet(service: TestClient, key: str) -> None:
    record = post(service, key).json()
    with sessions_of(service)() as session:
        assert keys.find(session, "somebody else", key) is None
        found = keys.find(session, "local", key)
        assert found is not None
        assert found.id == record["id"]


def test_a_message_that_is_run_again_waits_for_its_turn(service: TestClient, key: str) -> None:
    url = messages_of_a_conversation(service)
    first = say(service, url, key).json()
    cut_short(service, first["id"])
    long = {"prompt_content": "Tell me all of it", "max_length": 200}
    with ThreadPoolExecutor(1) as other:
        later = other.submit(service.post, url, json=long)
        while len(service.get(url).json()) == 1:
            assert not later.done()
        again = say(service, url, key).json()
        kept = service.get(url).json()
        assert [message["id"] for message in kept] == [first["id"], later.result().json()["id"]]
    assert kept[1] == later.result().json()  # it had ended before
    assert again["response_content"] == first["response_content"]
