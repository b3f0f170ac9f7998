"""The contract of the card: POST /generate and GET /history/{id}, as the first guide has them."""

import pytest
from fastapi.testclient import TestClient


def test_a_prompt_is_continued(client: TestClient) -> None:
    answer = client.post("/generate", json={"prompt": "Once upon a time", "max_length": 50})
    assert answer.status_code == 200
    record = answer.json()
    assert record["id"] >= 1
    assert record["generated_text"].startswith("Once upon a time")
    assert len(record["generated_text"]) > len("Once upon a time")
    assert record["model_name"] == "tiny-gpt2"
    assert record["created_at"].endswith("Z")


def test_what_was_answered_is_in_the_history(client: TestClient) -> None:
    record = client.post("/generate", json={"prompt": "There was a king"}).json()
    answer = client.get(f"/history/{record['id']}")
    assert answer.status_code == 200
    assert answer.json() == record


@pytest.mark.parametrize(("characters", "status"), [(0, 422), (1, 200), (500, 200), (501, 422)])
def test_a_prompt_has_1_to_500_characters(client: TestClient, characters: int, status: int) -> None:
    body = {"prompt": "a" * characters}
    assert client.post("/generate", json=body).status_code == status


@pytest.mark.parametrize(("max_length", "status"), [(9, 422), (10, 200), (200, 200), (201, 422)])
def test_max_length_is_10_to_200(client: TestClient, max_length: int, status: int) -> None:
    body = {"prompt": "Once", "max_length": max_length}
    answer = client.post("/generate", json=body)
    assert answer.status_code == status
    if status == 200:
        assert answer.json()["total_tokens"] <= max_length


def test_a_forbidden_word_is_refused(client: TestClient) -> None:
    answer = client.post("/generate", json={"prompt": "I HATE this"})
    assert answer.status_code == 400
    assert answer.json()["detail"] == "Prompt contains inappropriate content"


def test_a_record_that_is_not_there_is_404(client: TestClient) -> None:
    answer = client.get(f"/history/{2**63 - 1}")  # more than were ever made
    assert answer.status_code == 404
    assert answer.json()["detail"] == "Record not found"


def test_an_unknown_field_is_refused(client: TestClient) -> None:
    body = {"prompt": "Once", "max_lenght": 50}
    assert client.post("/generate", json=body).status_code == 422
