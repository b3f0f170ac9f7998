"""Records run again: beside others, and those that nothing can be compared with."""

from typing import Any

import pytest
from fastapi.testclient import TestClient

from benchmarks.replay_test import replays
from tests.service import Server

HELLO = {"prompt_content": "Hello?", "max_length": 30}


def said(client: TestClient, **body: Any) -> dict[str, Any]:
    """A message in a conversation of its own."""
    conversation = client.post("/conversations", json={"title": "Talk"}).json()["id"]
    answer = client.post(f"/conversations/{conversation}/messages", json=HELLO | body)
    assert answer.status_code == 201, answer.text
    message: dict[str, Any] = answer.json()
    return message


def replay(client: TestClient, message: dict[str, Any]) -> Any:
    return client.post(f"/history/{message['id']}/replay")


def test_records_made_in_a_crowd_come_out_the_same_beside_others(server: Server) -> None:
    assert replays(server.url, 16) == {"identical": 16}


@pytest.mark.parametrize("change", [{"response_content": "No."}, {"prompt_content": "Goodbye?"}])
def test_a_text_that_was_changed_by_hand_is_not_replayed(
    client: TestClient, change: dict[str, str]
) -> None:
    message = said(client)
    assert client.put(f"/messages/{message['id']}", json=change).status_code == 202
    answer = replay(client, message)
    assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
    assert answer.json()["detail"].startswith("This record's text was not generated as it stands:")
    assert answer.json()["id"] == message["id"]


def test_an_exchange_from_elsewhere_is_not_replayed(client: TestClient) -> None:
    answer = replay(client, said(client, response_content="Hello."))
    assert answer.status_code == 409
    assert answer.json()["detail"].startswith("This record's text was not generated as it stands:")


def test_a_change_that_changes_nothing_leaves_a_text_generated(client: TestClient) -> None:
    message = said(client)
    fields = ("prompt_content", "response_content", "prompt_tokens", "response_tokens")
    for body in ({}, {name: message[name] for name in fields[:2]}):
        changed = client.put(f"/messages/{message['id']}", json=body).json()
        assert {name: changed[name] for name in fields} == {name: message[name] for name in fields}
    assert replay(client, message).json()["result"] == "identical"


def test_a_changed_texts_tokens_are_those_of_the_same_text_from_elsewhere(
    client: TestClient,
) -> None:
    texts = {"prompt_content": "Where does the king live?", "response_content": "In his castle."}
    stored, message = said(client, **texts), said(client)
    half = {"response_content": texts["response_content"]}
    changed = client.put(f"/messages/{message['id']}", json=half).json()
    assert changed["prompt_tokens"] == message["prompt_tokens"]
    assert changed["response_tokens"] == stored["response_tokens"]
    changed = client.put(f"/messages/{message['id']}", json=texts).json()
    for name in ("prompt_tokens", "response_tokens", "total_tokens"):
        assert changed[name] == stored[name]
