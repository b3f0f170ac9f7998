"""Whatever is sent, the answer is a clear error in one shape that repeats nothing of it."""

import json
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from tests.service import Server

CANARY = "canary4711"
JSON = {"Content-Type": "application/json"}


def post(client: TestClient | httpx.Client, body: bytes) -> Any:
    return client.post("/generate", content=body, headers=JSON)


def refused(answer: Any, *statuses: int) -> dict[str, Any]:
    """The error's body, once its shape is right and it repeats nothing."""
    assert answer.status_code in statuses, answer.text[:500]
    body: dict[str, Any] = answer.json()
    assert set(body) == {"detail", "code", "request_id"}
    assert body["detail"]
    assert body["request_id"] == answer.headers["X-Request-ID"]
    assert CANARY not in answer.text
    assert len(answer.content) < 8192
    return body


def deep(levels: int) -> bytes:
    return b'{"prompt": ' + b"[" * levels + b"]" * levels + b"}"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"canary4711"',
        b'{"prompt": "canary4711"',
        b'{"prompt": "canary4711\xff"}',
        b"\xff\xfe\x00",
        b'\xef\xbb\xbf{"prompt": "canary4711"}x',
        b'{"prompt": null}',
        b'{"prompt": ["canary4711"]}',
        b'{"prompt": {"canary4711": 1}}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "canary4711\\udc00"}',
        b'{"prompt": "x", "user_id": "\\ud800"}',
        b'{"prompt": "x", "stop": ["\\udfff"]}',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "x", "top_p": -Infinity}',
        b'{"prompt": NaN}',
        b'{"prompt": "x", "seed": 9223372036854775808}',
        b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "x", "max_length": 1e400}',
        b'{"prompt": "x", "max_length": 50.5}',
        b'{"prompt": "x", "max_length": "50"}',
        b'{"prompt": "x", "max_length": true}',
        b'{"prompt": "x", "top_k": -1}',
        b'{"prompt": "x", "top_p": 0}',
        b'{"prompt": "x", "stop": ["a", "b", "c", "d", "e"]}',
        b'{"prompt": "x", "stop": [""]}',
        b'{"prompt": "x", "user_id": ""}',
        deep(1000),
        deep(100_000),
    ],
    ids=lambda body: repr(body[:40]),
)
def test_a_body_that_makes_no_sense_is_400_or_422(client: TestClient, body: bytes) -> None:
    before = client.get("/history").json()
    refused(post(client, body), 400, 422)
    assert client.get("/history").json() == before


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "canary4711\0"},
        {"prompt": "x", "user_id": "canary4711\0"},
        {"prompt": "x", "stop": ["canary4711\0"]},
    ],
)
def test_nul_is_400(client: TestClient, body: dict[str, Any]) -> None:
    assert refused(client.post("/generate", json=body), 400)["code"] == "bad_request"


@pytest.mark.parametrize(
    "path",
    [
        "/history?user_id=%00",
        "/history?model_name=a%00",
        "/users/%00/history",
    ],
)
def test_nul_in_a_query_or_path_is_400(client: TestClient, path: str) -> None:
    refused(client.get(path), 400)


@pytest.mark.parametrize(
    "path",
    [
        "/history/0",
        "/history/-1",
        "/history/9223372036854775808",
        "/history/canary4711",
        "/history?limit=0",
        "/history?limit=101",
        "/history?after=9223372036854775808",
        "/history?status=canary4711",
        "/history?created_after=canary4711",
        "/history?created_after=NaN",
        "/history?created_after=1e400",
        "/history?created_before=-99999999999999999999",
        "/history?created_after=0001-01-01T00:00:00%2B23:59",
        "/history?created_before=9999-12-31T23:59:59-23:59",
        "/history?canary=1",
        "/users//history",
        "/users/" + "a" * 201 + "/history",
        "/canary4711",
    ],
)
def test_a_path_or_query_that_makes_no_sense_is_a_clear_error(
    client: TestClient, path: str
) -> None:
    refused(client.get(path), 404, 422)


@pytest.mark.parametrize("name", ["\ud800", "\udfff" * 300, "a" * 10_000])
def test_a_field_name_is_shown_short_and_encodable(client: TestClient, name: str) -> None:
    body = json.dumps({"prompt": "x", name: CANARY}).encode()
    refused(post(client, body), 422)


def test_thousands_of_unknown_fields_give_a_short_answer(client: TestClient) -> None:
    body = {"prompt": "x"} | {f"field{number}": CANARY for number in range(20_000)}
    assert len(refused(client.post("/generate", json=body), 422)["detail"]) == 20


def test_a_large_body_is_413(client: TestClient) -> None:
    body = json.dumps({"prompt": CANARY * 1_000_000}).encode()
    assert refused(post(client, body), 413)["code"] == "body_too_large"


def test_a_large_body_is_413_over_the_network(server: Server) -> None:
    def pieces() -> Any:
        for _ in range(100):
            yield b"x" * 100_000

    with httpx.Client(base_url=server.url, timeout=30) as client:
        refused(post(client, b'"' + b"a" * 10_000_000 + b'"'), 413)
        chunked = client.post("/generate", content=pieces(), headers=JSON)
        refused(chunked, 413)
        assert client.get("/health/live").status_code == 200


def test_a_body_is_taken_up_to_the_limit(client: TestClient) -> None:
    body = json.dumps({"prompt": "x", "max_length": 10}).encode()
    assert post(client, body + b" " * (1_048_576 - len(body))).status_code == 200
    refused(post(client, body + b" " * (1_048_577 - len(body))), 413)


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_body_that_is_not_json_is_refused(client: TestClient, content_type: str) -> None:
    answer = client.post(
        "/generate", content=b"prompt=canary4711", headers={"Content-Type": content_type}
    )
    refused(answer, 415, 422)


def test_another_method_is_405(client: TestClient) -> None:
    answer = client.put("/generate", json={"prompt": "x"})
    assert refused(answer, 405)["code"] == "method_not_allowed"
    assert answer.headers["Allow"] == "POST"


def test_a_sane_request_id_is_kept(client: TestClient) -> None:
    answer = client.get("/history/999999", headers={"X-Request-ID": "abc-123_4.5"})
    assert refused(answer, 404)["request_id"] == "abc-123_4.5"


@pytest.mark.parametrize("given", ["", "a b", "a" * 129, "<script>", "ä".encode("latin-1")])
def test_another_request_id_is_replaced(client: TestClient, given: str | bytes) -> None:
    headers: Any = {"X-Request-ID": given}
    answer = client.get("/history", headers=headers)
    assert len(answer.headers["X-Request-ID"]) == 32
    assert answer.headers["X-Request-ID"] != given


def test_an_error_of_ours_is_500_and_says_nothing(client: TestClient) -> None:
    from main import app

    def broken() -> None:
        raise RuntimeError(CANARY)

    app.add_api_route("/broken", broken)
    route = app.router.routes.pop()
    app.router.routes.insert(0, route)
    try:
        quiet = TestClient(app, raise_server_exceptions=False)
        assert refused(quiet.get("/broken"), 500)["code"] == "internal_error"
    finally:
        app.router.routes.remove(route)
