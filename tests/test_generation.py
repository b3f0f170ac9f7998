"""Generations: lengths, seeds, stops, refusals, and what is kept of each."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from services.model_host import MAX_RUNNING
from tests.service import TINY, in_process, places_taken, ready
from tests.sse import events

PROMPT = "Once upon a time there was a king who had"


def post(client: TestClient, **body: Any) -> Any:
    return client.post("/generate", json={"prompt": PROMPT} | body)


def generated(client: TestClient, **body: Any) -> dict[str, Any]:
    answer = post(client, **body)
    assert answer.status_code == 200, answer.text
    record: dict[str, Any] = answer.json()
    return record


def tokens_of(text: str) -> int:
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    return len(AutoTokenizer.from_pretrained(TINY)(text, verbose=False)["input_ids"])


def test_max_length_counts_the_prompts_tokens(client: TestClient) -> None:
    record = generated(client, max_length=30)
    assert record["prompt_tokens"] == tokens_of(PROMPT)
    assert record["total_tokens"] == record["prompt_tokens"] + record["completion_tokens"]
    assert record["total_tokens"] <= 30
    if record["finish_reason"] == "length":
        assert record["total_tokens"] == 30


def test_without_max_length_there_are_50_more(client: TestClient) -> None:
    long = "king " * 100
    records = [generated(client, prompt=long, seed=seed) for seed in range(5)]
    assert records[0]["prompt_tokens"] > 50
    assert 10 < max(record["completion_tokens"] for record in records) <= 50


def test_one_token_of_room_is_enough_and_none_is_422(client: TestClient) -> None:
    prompt = "king " * 15
    length = tokens_of(prompt)
    assert 10 <= length < 200
    assert generated(client, prompt=prompt, max_length=length + 1)["completion_tokens"] <= 1
    answer = post(client, prompt=prompt, max_length=length)
    assert answer.status_code == 422
    assert answer.json()["code"] == "invalid_request"
    assert f"{length} tokens" in answer.json()["detail"]
    assert f"max_length is {length}" in answer.json()["detail"]


def test_a_message_beyond_the_context_is_422_with_all_that_counts(client: TestClient) -> None:
    prompt = " king" * 1020
    length = tokens_of(prompt)
    frame = tokens_of(f"User: {prompt}\nAssistant:") - length
    assert length < 1024 <= length + frame
    conversation = client.post("/conversations", json={"title": "Long"}).json()["id"]
    path = f"/conversations/{conversation}/messages"
    answer = client.post(path, json={"prompt_content": prompt})
    assert answer.status_code == 422
    for said in (f"is {length} tokens", "context is 1024 tokens", f"{frame} mark the turns"):
        assert said in answer.json()["detail"]
    alone = client.post("/analyze/anna", json={"text": f"{prompt} king king king king king"})
    assert alone.status_code == 422
    assert "context is 1024 tokens: it" in alone.json()["detail"]


@pytest.mark.parametrize(
    "prompt", ["🐉" * 500, "龍" * 500, "👩‍👩‍👧‍👦" * 71, "\u0301" * 500, "\t" * 500]
)
def test_500_characters_of_anything_are_answered_or_counted(
    client: TestClient, prompt: str
) -> None:
    for max_length in (None, 200):
        body = {"prompt": prompt} if max_length is None else {"prompt": prompt, "max_length": 200}
        answer = client.post("/generate", json=body)
        if answer.status_code == 200:
            assert answer.json()["generated_text"].startswith(prompt)
            assert answer.json()["prompt_tokens"] == tokens_of(prompt)
        else:
            assert answer.status_code == 422
            assert f"{tokens_of(prompt)} tokens" in answer.json()["detail"]


def test_the_record_has_every_field_of_the_contract(client: TestClient) -> None:
    record = generated(client, max_length=20, user_id="anna", seed=5)
    assert list(record) == [
        "id",
        "prompt",
        "generated_text",
        "model_name",
        "created_at",
        "status",
        "finish_reason",
        "user_id",
        "conversation_id",
        "prompt_tokens",
        "completion_tokens",
        "total_tokens",
        "cached",
        "seed",
        "duration_ms",
        "pinned",
        "text_removed_at",
    ]
    assert (record["prompt"], record["user_id"], record["seed"]) == (PROMPT, "anna", 5)
    assert (record["status"], record["cached"]) == ("completed", False)
    assert record["finish_reason"] in ("stop", "length")


def test_a_seed_is_drawn_stored_and_gives_the_text_again(client: TestClient) -> None:
    first = generated(client)
    again = generated(client, seed=first["seed"])
    assert again["generated_text"] == first["generated_text"]
    assert generated(client)["seed"] != first["seed"]


def test_a_drawn_seed_survives_a_client_whose_numbers_are_floats(client: TestClient) -> None:
    seeds = [generated(client, max_length=15)["seed"] for _ in range(5)]
    assert [int(float(seed)) for seed in seeds] == seeds
    assert max(seeds) >= 2**32  # so that two are hardly ever alike


def test_one_seed_at_once_is_one_text(client: TestClient) -> None:
    with ThreadPoolExecutor(12) as pool:
        others = [pool.submit(generated, client, max_length=60) for _ in range(4)]
        same = [pool.submit(generated, client, seed=8, max_length=60) for _ in range(8)]
        assert len({future.result()["generated_text"] for future in same}) == 1
        assert len({future.result()["generated_text"] for future in others}) > 1
    assert (
        generated(client, seed=8, max_length=60)["generated_text"]
        == (same[0].result()["generated_text"])
    )


def test_greedy_is_the_text_of_the_transformers_pipeline(tmp_path: Path) -> None:
    with in_process(DATABASE_URL=f"sqlite:///{tmp_path / 'records.db'}", DTYPE="float32") as client:
        models = ready(client).app.state.models  # type: ignore[attr-defined]
        pipeline = models.model.pipeline
        for prompt in (PROMPT, "The wolf", "龍"):
            expected = pipeline(prompt, do_sample=False, max_length=60, max_new_tokens=None)
            record = generated(client, prompt=prompt, temperature=0, max_length=60)
            assert record["generated_text"] == expected[0]["generated_text"]


def test_a_zero_byte_from_the_model_is_stored_on_every_database(database_url: str) -> None:
    body = {"prompt": "🦄🦄", "temperature": 2.0, "top_k": 0, "top_p": 1.0, "max_length": 30}
    with in_process(DATABASE_URL=database_url, DTYPE="float32") as service:
        client = ready(service)
        record = generated(client, **body, seed=1478)  # with which the model says it at once
        assert record["generated_text"].startswith("🦄🦄\ufffd")
        assert "\0" not in record["generated_text"]
        streamed = client.post("/generate/stream", json=body | {"seed": 1478})
        *_, done = events(streamed.text.splitlines())
        assert done.data["generated_text"] == record["generated_text"]
        again = client.post(f"/history/{record['id']}/replay").json()
        assert again["result"] == "identical"


def test_a_text_ends_before_its_stop_string(client: TestClient) -> None:
    whole = generated(client, temperature=0, max_length=100)
    completion = whole["generated_text"].removeprefix(PROMPT)
    stop = completion[20:24]
    record = generated(client, temperature=0, max_length=100, stop=["never this", stop])
    expected = completion[: completion.index(stop)]
    assert record["generated_text"] == PROMPT + expected
    assert record["finish_reason"] == "stop"
    assert record["completion_tokens"] < whole["completion_tokens"]


def test_a_stop_string_in_the_prompt_does_not_count(client: TestClient) -> None:
    record = generated(client, temperature=0, max_length=40, stop=["Once upon"])
    assert record["generated_text"].startswith(PROMPT)
    assert record["completion_tokens"] > 0


def test_a_refused_prompt_is_stored_as_nothing(client: TestClient) -> None:
    before = client.get("/history").json()
    assert post(client, prompt="so much HATE").status_code == 400
    assert client.get("/history").json() == before


def test_a_token_that_the_model_has_no_row_for_is_422(tmp_path: Path) -> None:
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_tokens(["<hidden>"])
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    tokenizer.save_pretrained(model)
    url = f"sqlite:///{tmp_path / 'records.db'}"
    with in_process(DATABASE_URL=url, MODEL=str(model)) as client:
        answer = post(ready(client), prompt="Once <hidden>")
        assert answer.status_code == 422
        assert "not in the model's vocabulary" in answer.json()["detail"]
        assert client.get("/history").json() == []


def test_50_at_once_are_all_in_the_history(client: TestClient) -> None:
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: post(client, max_length=30), range(50)))
    assert {answer.status_code for answer in answers} <= {200, 503}
    found = [answer.json() for answer in answers if answer.status_code == 200]
    assert found
    assert len({record["id"] for record in found}) == len(found)
    for record in found:
        assert client.get(f"/history/{record['id']}").json() == record
    for answer in answers:
        assert answer.status_code == 200 or int(answer.headers["Retry-After"]) > 0


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A service in which 4 may wait beside those that run."""
    url = f"sqlite:///{tmp_path_factory.mktemp('small') / 'records.db'}"
    with in_process(DATABASE_URL=url, MAX_WAITING="4") as client:
        yield ready(client)


def test_as_many_at_once_as_may_run_and_wait_are_answered(small: TestClient) -> None:
    count = MAX_RUNNING + 4
    with ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(lambda _: post(small, max_length=100), range(count)))
    assert [answer.status_code for answer in answers] == [200] * count


def test_a_full_queue_is_503_and_stores_nothing(small: TestClient) -> None:
    before = small.get("/history").json()
    with places_taken(small, MAX_RUNNING + 4):
        answer = post(small)
        assert answer.status_code == 503
        assert answer.json()["code"] == "overloaded"
        assert int(answer.headers["Retry-After"]) > 0
        assert small.get("/history").json() == before
        assert small.get("/health/ready").json()["waiting"] == MAX_RUNNING + 4
    assert post(small, max_length=20).status_code == 200


def test_the_deadline_is_504_and_the_record_failed(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'records.db'}"
    environment = {"DATABASE_URL": url, "REQUEST_TIMEOUT_SECONDS": "0.05", "MAX_WAITING": "1"}
    with in_process(**environment) as client, places_taken(ready(client), MAX_RUNNING):
        for _ in range(3):  # each gives the last place back
            answer = post(client, max_length=200)
            assert answer.status_code == 504
            body = answer.json()
            assert body["code"] == "deadline_exceeded"
            record = client.get(f"/history/{body['id']}").json()
            assert (record["status"], record["finish_reason"]) == ("failed", "error")
            assert record["prompt"] == PROMPT
