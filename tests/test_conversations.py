"""Conversations: the book's CRUD, replies with the whole thread, titles, streams in threads."""

import asyncio
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy.orm import Session

from database import Database, transaction
from errors import NotFoundError
from models import GenerationRecord
from repositories import conversations
from repositories.titles import OF_FIRST_MESSAGE
from services import conversations as service
from tests.service import in_process, ready, sessions_of
from tests.sse import events, text_of
from tests.test_history import NOON, OWNER, insert
from tests.test_retention import WAITING, wait_until_waiting


def new(client: TestClient, **fields: str) -> dict[str, Any]:
    answer = client.post("/conversations", json=fields)
    assert answer.status_code == 201
    created: dict[str, Any] = answer.json()
    return created


def say(client: TestClient, conversation: dict[str, Any], text: str, **options: Any) -> Any:
    body = {"prompt_content": text, "max_length": 30} | options
    return client.post(f"/conversations/{conversation['id']}/messages", json=body)


def test_a_conversation_is_created_read_changed_and_deleted(client: TestClient) -> None:
    made = new(client, title="Tales")
    assert set(made) == {"id", "title", "model_type", "created_at", "updated_at"}
    path = f"/conversations/{made['id']}"
    assert client.get(path).json() == made
    changed = client.put(path, json={"title": "Other tales"})
    assert changed.status_code == 202
    assert changed.json()["title"] == "Other tales"
    assert changed.json()["model_type"] == made["model_type"]
    assert changed.json()["created_at"] == made["created_at"]
    assert changed.json()["updated_at"] > made["updated_at"]
    assert client.delete(path).status_code == 204
    for gone in (client.get(path), client.put(path, json={}), client.delete(path)):
        assert gone.status_code == 404
        assert gone.json()["detail"] == "Conversation not found"


def test_conversations_are_listed_newest_first_by_offset_and_by_key(client: TestClient) -> None:
    made = [new(client, title=f"List {n}")["id"] for n in range(5)][::-1]
    by_offset = client.get("/conversations?skip=1&take=2").json()
    assert [found["id"] for found in by_offset] == made[1:3]
    by_key = client.get(f"/conversations?take=2&after={made[1]}")
    assert [found["id"] for found in by_key.json()] == made[2:4]
    assert f"after={made[3]}" in by_key.headers["link"]


def test_what_was_skipped_once_is_not_skipped_on_every_page(client: TestClient) -> None:
    made = [new(client, title=f"Skip {n}")["id"] for n in range(5)][::-1]
    first = client.get("/conversations?skip=1&take=2")
    second = client.get(first.links["next"]["url"])
    assert [found["id"] for found in first.json() + second.json()] == made[1:5]


def test_a_reply_is_stored_as_a_message_of_its_conversation(client: TestClient) -> None:
    conversation = new(client, title="Reply")
    answer = say(client, conversation, "Who lives in the wood?")
    assert answer.status_code == 201
    message = answer.json()
    assert message["conversation_id"] == conversation["id"]
    assert message["prompt_content"] == "Who lives in the wood?"
    assert message["is_success"]
    assert message["status_code"] == 200
    assert message["total_tokens"] == message["prompt_tokens"] + message["response_tokens"]
    assert client.get(f"/messages/{message['id']}").json() == message
    listed = client.get(f"/conversations/{conversation['id']}/messages").json()
    assert listed == [message]
    record = client.get(f"/history/{message['id']}").json()
    assert record["conversation_id"] == conversation["id"]
    assert record["generated_text"] == message["prompt_content"] + message["response_content"]
    replayed = client.post(f"/history/{message['id']}/replay").json()
    assert replayed["result"] == "identical"


def test_a_reply_has_read_the_thread(client: TestClient) -> None:
    conversation = new(client, title="Thread")
    first = say(client, conversation, "Tell me of a king", seed=1).json()
    second = say(client, conversation, "And then?", seed=3).json()
    assert second["prompt_tokens"] > first["total_tokens"]
    other = say(client, new(client, title="Other"), "And then?", seed=3).json()
    assert other["prompt_tokens"] < second["prompt_tokens"]
    assert other["response_content"] != second["response_content"]
    assert client.post(f"/history/{second['id']}/replay").json()["result"] == "identical"


def test_a_conversation_goes_on_past_the_models_context(client: TestClient) -> None:
    conversation = new(client, title="Long")
    exchange = {"prompt_content": "word " * 60, "response_content": "another word " * 60}
    for _ in range(8):
        path = f"/conversations/{conversation['id']}/messages"
        assert client.post(path, json=exchange).status_code == 201
    answer = say(client, conversation, "What did I say?")
    assert answer.status_code == 201
    assert 500 < answer.json()["prompt_tokens"] <= 1024 - 20


def test_an_exchange_from_elsewhere_is_stored_as_it_is(client: TestClient) -> None:
    conversation = new(client, title="Import")
    answer = say(client, conversation, "Hello?", response_content="Hello.")
    assert answer.status_code == 201
    assert answer.json()["response_content"] == "Hello."
    assert answer.json()["response_tokens"] > 0


def test_a_message_is_changed_and_deleted(client: TestClient) -> None:
    conversation = new(client, title="Edit")
    message = say(client, conversation, "Hello?", response_content="Hello.").json()
    path = f"/messages/{message['id']}"
    changed = client.put(path, json={"response_content": "Good day."})
    assert changed.status_code == 202
    assert changed.json()["response_content"] == "Good day."
    assert changed.json()["prompt_content"] == "Hello?"
    assert changed.json()["updated_at"] > message["updated_at"]
    assert client.delete(path).status_code == 204
    assert client.get(path).status_code == 404
    assert client.get(path).json()["detail"] == "Message not found"


@pytest.mark.parametrize("fields", [[], ["title", "model_type"]])
def test_a_conversation_of_which_nothing_changes_keeps_its_time(
    service: TestClient, fields: list[str]
) -> None:
    made = new(service, title="Same")
    path = f"/conversations/{made['id']}"
    answer = service.put(path, json={field: made[field] for field in fields})
    assert (answer.status_code, answer.json()) == (202, made)
    assert service.get(path).json() == made


def test_the_first_words_taken_as_a_title_by_hand_stay(client: TestClient) -> None:
    conversation = new(client, initial_prompt="Tell me a story of a goose and of her golden eggs")
    path = f"/conversations/{conversation['id']}"
    assert client.put(path, json={"title": conversation["title"]}).status_code == 202
    wait_for_titles(client)
    assert client.get(path).json()["title"] == conversation["title"]


@pytest.mark.parametrize("fields", [[], ["prompt_content", "response_content"]])
def test_a_message_of_which_nothing_changes_stays_as_it_is(
    service: TestClient, fields: list[str]
) -> None:
    """With its time and its conversation's, and as the answer from the cache that it may be."""
    text = f"What was there before {len(fields)} fields?"
    say(service, new(service, title="First"), text, use_cache=True)
    conversation = new(service, title="Second")
    message = say(service, conversation, text, use_cache=True).json()
    paths = [f"/messages/{message['id']}", f"/history/{message['id']}"]
    paths.append(f"/conversations/{conversation['id']}")
    before = [service.get(path).json() for path in paths]
    assert before[1]["cached"]
    answer = service.put(paths[0], json={field: message[field] for field in fields})
    assert (answer.status_code, answer.json()) == (202, message)
    assert [service.get(path).json() for path in paths] == before


def test_messages_go_with_their_conversation(client: TestClient) -> None:
    conversation = new(client, title="Cascade")
    message = say(client, conversation, "Hello?", response_content="Hello.").json()
    client.delete(f"/conversations/{conversation['id']}")
    assert client.get(f"/messages/{message['id']}").status_code == 404
    assert client.get(f"/history/{message['id']}").status_code == 404


def test_a_record_outside_conversations_is_no_message(client: TestClient) -> None:
    record = client.post("/generate", json={"prompt": "Once"}).json()
    assert client.get(f"/messages/{record['id']}").status_code == 404


def test_replies_asked_for_at_once_come_one_after_the_other(client: TestClient) -> None:
    conversation = new(client, title="Order")
    threads = [
        threading.Thread(target=say, args=(client, conversation, f"Number {n}")) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    messages = client.get(f"/conversations/{conversation['id']}/messages").json()
    assert len(messages) == 4
    for earlier, later in itertools.pairwise(messages):
        assert earlier["updated_at"] <= later["created_at"]
        assert later["prompt_tokens"] > earlier["prompt_tokens"]


def test_of_two_that_take_a_turn_at_once_one_waits(database: Database) -> None:
    taken: list[int] = []

    def take(record: int, conversation: int) -> None:
        with database.sessions() as session, transaction(session):
            if conversations.is_at(session, OWNER, conversation, 0):
                time.sleep(0.1)
                session.get_one(GenerationRecord, record).conversation_id = conversation
                taken.append(record)

    with database.sessions() as session:
        free = [insert(session) for _ in range(4)]
        with transaction(session):
            thread = conversations.add(
                session, OWNER, title="", model_type="", created_at=NOON, updated_at=NOON
            )
    takers = [threading.Thread(target=take, args=(record, thread.id)) for record in free]
    for taker in takers:
        taker.start()
    for taker in takers:
        taker.join()
    assert len(taken) == 1


def test_a_reply_is_streamed(client: TestClient) -> None:
    conversation = new(client, title="Stream")
    path = f"/conversations/{conversation['id']}/messages/stream"
    body = {"prompt_content": "Who lives in the wood?", "max_length": 40}
    with client.stream("POST", path, json=body) as answer:
        found = list(events(answer.iter_lines()))
    assert [found[0].name, found[-1].name] == ["start", "done"]
    message = client.get(f"/messages/{found[-1].data['id']}").json()
    assert message["response_content"] == text_of(found)


@pytest.mark.parametrize("in_conversation", [False, True])
def test_a_browser_streams_with_a_get(client: TestClient, in_conversation: bool) -> None:
    query = {"prompt": "Once upon a time"}
    if in_conversation:
        query["conversation_id"] = str(new(client, title="Get")["id"])
    with client.stream("GET", "/text/generate/stream", params=query) as answer:
        found = list(events(answer.iter_lines()))
    assert found[-1].name == "done"
    assert found[-1].data["prompt"] == "Once upon a time"


def test_streaming_into_a_conversation_that_is_not_there_is_404(client: TestClient) -> None:
    query = {"prompt": "Once", "conversation_id": "999999"}
    assert client.get("/text/generate/stream", params=query).status_code == 404


def title_after_a_while(client: TestClient, conversation_id: int, other_than: str) -> str:
    deadline = time.monotonic() + 20
    title = other_than
    while title == other_than and time.monotonic() < deadline:
        time.sleep(0.1)
        title = str(client.get(f"/conversations/{conversation_id}").json()["title"])
    return title


def test_the_model_suggests_a_title_from_the_initial_prompt(client: TestClient) -> None:
    prompt = "Tell me the story of the fisherman, his wife, and the fish that granted every wish"
    conversation = new(client, initial_prompt=prompt)
    assert prompt.startswith(conversation["title"])
    title = title_after_a_while(client, conversation["id"], conversation["title"])
    assert title
    assert title != conversation["title"]


def test_a_title_set_by_hand_stays(client: TestClient) -> None:
    conversation = new(client, initial_prompt="Tell me a story")
    client.put(f"/conversations/{conversation['id']}", json={"title": "Mine"})
    later = new(client, initial_prompt="Tell me another one, of a king who had three daughters")
    title_after_a_while(client, later["id"], later["title"])
    assert client.get(f"/conversations/{conversation['id']}").json()["title"] == "Mine"


def test_nobody_reads_what_another_owner_has(database: Database, session: Session) -> None:
    with transaction(session):
        theirs = conversations.add(
            session,
            "somebody else",
            title="Secret",
            model_type="tiny-gpt2",
            created_at=NOON,
            updated_at=NOON,
        )
    assert service.get(session, "somebody else", theirs.id).title == "Secret"
    with pytest.raises(NotFoundError):
        service.get(session, OWNER, theirs.id)
    found = asyncio.run(service.read(database.reader, "somebody else", theirs.id))
    assert found.title == "Secret"
    with pytest.raises(NotFoundError):
        asyncio.run(service.read(database.reader, OWNER, theirs.id))


def say_at_once(client: TestClient, conversation: dict[str, Any], count: int) -> list[Any]:
    with ThreadPoolExecutor(count) as pool:
        texts = [f"Number {n}" for n in range(count)]
        return list(pool.map(lambda text: say(client, conversation, text, max_length=60), texts))


def test_who_waits_for_a_turn_takes_no_place_of_the_models_queue(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'records.db'}"
    with in_process(DATABASE_URL=url, MAX_WAITING="1") as own:
        conversation = new(ready(own), title="Few places")
        answers = say_at_once(own, conversation, 16)
        assert [answer.status_code for answer in answers] == [201] * 16
        kept = own.get(f"/conversations/{conversation['id']}/messages").json()
        assert len(kept) == 16


def test_no_more_wait_for_a_turn_than_leave_threads_for_others(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'records.db'}"
    with in_process(DATABASE_URL=url, REQUEST_THREADS="12", DATABASE_POOL_SIZE="12") as own:
        conversation = new(ready(own), title="Few threads")
        answers = say_at_once(own, conversation, 12)
        refused = [answer for answer in answers if answer.status_code == 503]
        assert {answer.status_code for answer in answers} == {201, 503}
        for answer in refused:
            assert answer.json()["code"] == "overloaded"
            assert int(answer.headers["Retry-After"]) > 0
        kept = own.get(f"/conversations/{conversation['id']}/messages").json()
        assert len(kept) == 12 - len(refused) >= 3  # one was answered while two waited
        assert say(own, conversation, "Are there places again?").status_code == 201


def wait_for_titles(client: TestClient) -> None:
    deadline = time.monotonic() + 20
    with sessions_of(client)() as session:
        while conversations.untitled(session, 1):
            assert time.monotonic() < deadline
            session.rollback()
            time.sleep(0.1)


def test_a_prompt_longer_than_the_models_context_holds_up_no_title(client: TestClient) -> None:
    made = [new(client, initial_prompt=prompt)["id"] for prompt in ("🐉" * 500, "A tale", "Two")]
    wait_for_titles(client)
    assert all(client.get(f"/conversations/{id}").json()["title"] for id in made)


def test_a_conversation_begun_without_a_title_gets_one_from_its_first_message(
    service: TestClient,
) -> None:
    conversation = new(service)
    say(service, conversation, "Tell me of the king who had three daughters and a golden bird")
    wait_for_titles(service)
    with sessions_of(service)() as session:
        titled = conversations.get(session, OWNER, conversation["id"])
        assert titled is not None
        assert titled.title not in ("", conversation["title"])
        assert titled.title_pending is None
        assert (
            titled.initial_prompt == OF_FIRST_MESSAGE
        )  # the text is kept once: it goes with its message


def test_a_clients_own_title_stays_whatever_it_is(client: TestClient) -> None:
    conversation = new(client, title="New conversation")
    say(client, conversation, "Tell me a story")
    found = client.get(f"/conversations/{conversation['id']}").json()
    assert found["title"] == "New conversation"


def test_messages_are_changed_and_deleted_while_their_conversation_is(service: TestClient) -> None:
    found: set[int] = set()
    with ThreadPoolExecutor(8) as pool:
        for _ in range(12):
            conversation = new(service, title="Short")
            path = f"/conversations/{conversation['id']}"
            said = [say(service, conversation, "a", response_content="b").json() for _ in range(8)]
            messages = [f"/messages/{message['id']}" for message in said]
            asked = [
                pool.submit(service.put, path, json={"response_content": "c"})
                for path in messages[:6]
            ]
            asked += [pool.submit(service.delete, path) for path in [*messages[6:], path]]
            found |= {one.result().status_code for one in asked}
    assert found <= {202, 204, 404}


@pytest.mark.parametrize("service", WAITING, indirect=True)
def test_an_exchange_that_comes_while_its_conversation_is_deleted_is_404(
    service: TestClient,
) -> None:
    conversation = new(service, title="Short")
    database: Database = service.app.state.database  # type: ignore[attr-defined]
    with database.sessions() as session, ThreadPoolExecutor() as threads:
        with transaction(session):
            assert conversations.remove(session, OWNER, conversation["id"])
            saying = threads.submit(say, service, conversation, "a", response_content="b")
            wait_until_waiting(database, saying)
        assert saying.result().status_code == 404
