"""Whatever a client sends, the answer is one shape of error, and nothing of the input is in it."""

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from tests.service import serving

CANARY = "zyxcanary"
JSON = {"Content-Type": "application/json"}


def body_of(answer: Any, status: int, code: str) -> dict[str, Any]:
    """The error, held to the shape that every error has."""
    assert answer.status_code == status, answer.text[:300]
    found: dict[str, Any] = answer.json()
    assert set(found) == {"detail", "code", "request_id"}
    assert found["code"] == code
    assert found["request_id"] == answer.headers["X-Request-ID"] != ""
    assert CANARY not in answer.text
    return found


def post(client: TestClient, content: str | bytes) -> Any:
    return client.post("/generate", content=content, headers=JSON)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"prompt": "zyxcanary"',
        b"zyxcanary",
        b'{"prompt": "zyxcanary",}',
        b'{"prompt": "zyxcanary"} zyxcanary',
        b'["zyxcanary"]',
        b'"zyxcanary"',
        b"null",
        b"7",
        b"{'prompt': 'zyxcanary'}",
    ],
)
def test_a_body_that_is_no_request_is_422(client: TestClient, content: bytes) -> None:
    body_of(post(client, content), 422, "validation_error")


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfezyxcanary",
        b'{"prompt": "zyxcanary \xff"}',
        b'{"zyxcanary\xc3": 1}',
        b"[" * 100_000,
        b'{"prompt":' * 50_000,
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": "zyxcanary", "seed": 1' + b"0" * 5000 + b"}",
    ],
    ids=["utf16", "byte", "key", "lists", "objects", "closed", "digits"],
)
def test_a_body_that_cannot_be_read_is_400(client: TestClient, content: bytes) -> None:
    found = body_of(post(client, content), 400, "bad_request")
    assert "could not be read as JSON in UTF-8" in found["detail"]


@pytest.mark.parametrize("path", ["/generate", "/generate/stream", "/analyze/anna"])
@pytest.mark.parametrize(
    "sent_as", [None, "application/x-www-form-urlencoded", "text/plain", "nonsense"]
)
@pytest.mark.parametrize("content", [b'{"prompt": "Once"}', b"zyxcanary"])
def test_a_body_that_is_not_sent_as_json_is_415(
    client: TestClient, content: bytes, sent_as: str | None, path: str
) -> None:
    headers = {} if sent_as is None else {"Content-Type": sent_as}
    answer = client.post(path, content=content, headers=headers)
    found = body_of(answer, 415, "unsupported_media_type")
    assert "Content-Type: application/json" in found["detail"]


@pytest.mark.parametrize("sent_as", ["application/json; charset=utf-8", "Application/JSON"])
def test_json_may_be_told_in_many_ways(client: TestClient, sent_as: str) -> None:
    headers = {"Content-Type": sent_as}
    answer = client.post("/generate", content=b'{"prompt": "Once"}', headers=headers)
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "content",
    [
        b'{"prompt": "zyxcanary \xed\xa0\x80"}',
        r'{"prompt": "zyxcanary \ud800"}',
        r'{"prompt": "zyxcanary \udc00\ud800"}',
        r'{"prompt": "Once", "user_id": "zyxcanary \udfff"}',
        r'{"prompt": "Once", "stop": ["zyxcanary \ud800"]}',
        r'{"prompt": "Once", "\ud800": 1}',
        r'{"prompt": "Once", "\ud800": "zyxcanary"}',
        r'{"prompt": "Once", "temperature": "\ud800"}',
    ],
)
def test_half_a_character_is_422(client: TestClient, content: str | bytes) -> None:
    body_of(post(client, content), 422, "validation_error")


@pytest.mark.parametrize("field", ["temperature", "top_p", "top_k", "seed", "max_length"])
@pytest.mark.parametrize(
    "number", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 4000, "true", '"1"', "[]", "-1"]
)
def test_a_number_that_is_none_is_422(client: TestClient, field: str, number: str) -> None:
    body_of(
        post(client, f'{{"prompt": "zyxcanary", "{field}": {number}}}'), 422, "validation_error"
    )


@pytest.mark.parametrize("number", ["1.5", "10.5", "1e400", str(2**63)])
@pytest.mark.parametrize("field", ["top_k", "seed", "max_length"])
def test_an_integer_is_whole_and_bounded(client: TestClient, field: str, number: str) -> None:
    body_of(
        post(client, f'{{"prompt": "zyxcanary", "{field}": {number}}}'), 422, "validation_error"
    )


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "zyxcanary \0"},
        {"prompt": "Once", "user_id": "zyxcanary\0"},
        {"prompt": "Once", "stop": ["zyxcanary\0"]},
    ],
)
def test_nul_is_400(client: TestClient, body: dict[str, Any]) -> None:
    body_of(client.post("/generate", json=body), 400, "bad_request")


@pytest.mark.parametrize(
    "path",
    [
        "/users/zyxcanary%00/history",
        "/history?user_id=zyxcanary%00",
        "/history?model_name=zyxcanary%00",
    ],
)
def test_nul_in_an_address_is_400(client: TestClient, path: str) -> None:
    body_of(client.get(path), 400, "bad_request")


def test_nobody_with_nul_in_a_name_is_erased(client: TestClient) -> None:
    body_of(client.delete("/users/zyxcanary%00"), 400, "bad_request")


@pytest.mark.parametrize(
    "path",
    ["/users/%ff%fe/history", "/history?user_id=%ff", "/history?%ff=1", "/%00", "/history/%00"],
)
def test_an_address_that_is_no_text_is_no_failure(client: TestClient, path: str) -> None:
    assert client.get(path).status_code in (200, 404, 422)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": None},
        {"prompt": ["zyxcanary"]},
        {"prompt": "zyxcanary" * 100},
        {"prompt": "Once", "user_id": ""},
        {"prompt": "Once", "user_id": "zyxcanary" * 30},
        {"prompt": "Once", "stop": "zyxcanary"},
        {"prompt": "Once", "stop": ["zyxcanary"] * 5},
        {"prompt": "Once", "stop": [""]},
        {"prompt": "Once", "temperature": "zyxcanary"},
        {"prompt": "Once", "temperature": 2.1},
        {"prompt": "Once", "top_p": 0},
        {"prompt": "Once", "max_length": {"zyxcanary": 1}},
    ],
)
def test_a_wrong_value_is_422_and_not_repeated(client: TestClient, body: dict[str, Any]) -> None:
    found = body_of(client.post("/generate", json=body), 422, "validation_error")
    assert all(set(item) == {"type", "loc", "msg"} for item in found["detail"])


TEXTS: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", "/generate", {"prompt": 500}),
    ("POST", "/generate", {"user_id": 200}),
    ("POST", "/generate", {"stop": 100}),
    ("POST", "/generate/stream", {"prompt": 500}),
    ("POST", "/analyze/anna", {"text": 100_000}),
    ("POST", "/conversations", {"title": 200}),
    ("POST", "/conversations", {"model_type": 200}),
    ("POST", "/conversations", {"initial_prompt": 100_000}),
    ("PUT", "/conversations/1", {"title": 200}),
    ("POST", "/conversations/1/messages", {"prompt_content": 100_000}),
    ("PUT", "/messages/1", {"prompt_content": 100_000}),
    ("GET", "/history", {"user_id": 200}),
    ("GET", "/text/generate/stream", {"prompt": 500}),
]
LONG_TEXTS: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", "/conversations/1/messages", {"response_content": 100_000}),
    ("GET", "/history", {"model_name": 200}),
    ("GET", "/history", {"q": 500}),
    ("GET", "/conversations", {"q": 500}),
]


def message_of(client: TestClient, method: str, path: str, field: str, text: str) -> str:
    """What is said of a field that holds a text, in a list where it takes one."""
    if method == "GET":
        answer = client.get(path, params={field: text})
    else:
        value = [text] if field == "stop" else text
        answer = client.request(method, path, json={field: value})
    found = body_of(answer, 422, "validation_error")["detail"]
    (message,) = [item["msg"] for item in found if field in item["loc"]]
    return str(message)


@pytest.mark.parametrize(("method", "path", "longest"), TEXTS)
def test_an_empty_text_is_told_in_characters(
    client: TestClient, method: str, path: str, longest: dict[str, int]
) -> None:
    (field,) = longest
    message = message_of(client, method, path, field, "")
    assert message == "String should have at least 1 character"


@pytest.mark.parametrize(("method", "path", "longest"), TEXTS + LONG_TEXTS)
def test_a_text_that_is_too_long_is_told_in_characters(
    client: TestClient, method: str, path: str, longest: dict[str, int]
) -> None:
    ((field, count),) = longest.items()
    message = message_of(client, method, path, field, "a" * (count + 1))
    assert message == f"String should have at most {count} characters"


def test_an_empty_user_in_a_path_is_told_in_characters(client: TestClient) -> None:
    found = body_of(client.get("/users//history"), 422, "validation_error")["detail"]
    assert found[0]["msg"] == "String should have at least 1 character"


def test_a_stream_refuses_what_generate_refuses(client: TestClient) -> None:
    answer = client.post("/generate/stream", json={"prompt": "Once", "on_disconnect": "zyxcanary"})
    body_of(answer, 422, "validation_error")


def test_thousands_of_unknown_fields_give_a_short_answer(client: TestClient) -> None:
    body = {"prompt": "zyxcanary"} | {f"field{number}": "zyxcanary" for number in range(5000)}
    answer = client.post("/generate", json=body)
    assert 1 <= len(body_of(answer, 422, "validation_error")["detail"]) <= 20
    assert len(answer.content) < 5000


def test_a_huge_field_name_gives_a_short_answer(client: TestClient) -> None:
    answer = client.post("/generate", json={"prompt": "Once", "x" * 100_000: 1})
    body_of(answer, 422, "validation_error")
    assert len(answer.content) < 1000


def test_a_body_over_the_limit_is_413(client: TestClient) -> None:
    limit = client.app.state.settings.max_body_bytes  # type: ignore[attr-defined]
    found = body_of(post(client, b'"' + b"a" * limit + b'"'), 413, "body_too_large")
    assert str(limit) in found["detail"]
    body_of(post(client, b'"' + b"a" * (limit - 2) + b'"'), 422, "validation_error")


def test_ten_megabytes_are_413_over_a_socket(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'records.db'}"
    with serving(tmp_path / "log", DATABASE_URL=url) as server:
        content = json.dumps({"prompt": CANARY * 1_200_000}).encode()
        answer = httpx.post(f"{server.url}/generate", content=content, headers=JSON, timeout=60)
        body_of(answer, 413, "body_too_large")
        chunks = (content[at : at + 65_536] for at in range(0, len(content), 65_536))
        answer = httpx.post(f"{server.url}/generate", content=chunks, headers=JSON, timeout=60)
        body_of(answer, 413, "body_too_large")
        assert httpx.get(f"{server.url}/history").json() == []


@pytest.mark.parametrize("path", ["/zyxcanary", "/history/1/zyxcanary", "/user", "//"])
def test_an_unknown_address_is_404(client: TestClient, path: str) -> None:
    assert body_of(client.get(path), 404, "not_found")["detail"] == "Not Found"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/generate", "POST"),
        ("PUT", "/history/1", "GET, DELETE"),
        ("POST", "/history", "GET"),
        ("OPTIONS", "/conversations", "GET, POST"),
        ("POST", "/conversations/1", "GET, PUT, DELETE"),
        ("DELETE", "/metrics", "GET, HEAD"),
        ("GET", "/users", "DELETE"),
        ("GET", "/users/a/b", "DELETE"),
    ],
)
def test_a_wrong_method_is_405_and_the_right_ones_are_named(
    client: TestClient, method: str, path: str, allowed: str
) -> None:
    answer = client.request(method, path)
    body_of(answer, 405, "method_not_allowed")
    assert answer.headers["Allow"] == allowed


@pytest.mark.parametrize("path", ["/health/live", "/health/ready", "/metrics"])
def test_a_monitor_may_ask_for_the_head_alone(client: TestClient, path: str) -> None:
    answer = client.head(path)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == client.get(path).headers["Content-Type"]
    assert "head" not in client.get("/openapi.json").json()["paths"][path]


@pytest.mark.parametrize("action", ["", "/stream", "/cancel", "/replay"])
@pytest.mark.parametrize("number", [0, -1, 2**63, 10**30, "zyxcanary", "1.5", "%F0%9F%98%80"])
def test_an_id_that_cannot_be_is_422(client: TestClient, number: int | str, action: str) -> None:
    method = "POST" if action in ("/cancel", "/replay") else "GET"
    body_of(client.request(method, f"/history/{number}{action}"), 422, "validation_error")


@pytest.mark.parametrize(
    ("method", "action"),
    [("GET", ""), ("DELETE", ""), ("GET", "/stream"), ("POST", "/cancel"), ("POST", "/replay")],
)
def test_the_largest_id_is_404(client: TestClient, method: str, action: str) -> None:
    answer = client.request(method, f"/history/{2**63 - 1}{action}")
    assert body_of(answer, 404, "not_found")["detail"] == "Record not found"


@pytest.mark.parametrize("bound", ["created_after", "created_before"])
@pytest.mark.parametrize(
    "moment",
    [
        "0001-01-01T00:00:00+23:59",
        "0001-01-01T00:00:00-23:59",
        "0001-01-01",
        "9999-12-31T23:59:59-23:59",
        "9999-12-31T23:59:59.999999Z",
        "10000-01-01T00:00:00Z",
        "-0001-01-01T00:00:00Z",
        "1e999",
        "NaN",
        "99999999999999999999",
        "-99999999999999999999",
        "0",
        "zyxcanary",
        "2024-02-30",
        "",
    ],
)
def test_a_moment_at_the_edge_is_no_failure(client: TestClient, bound: str, moment: str) -> None:
    answer = client.get("/history", params={bound: moment})
    if answer.status_code != 200:
        body_of(answer, 422, "validation_error")


@pytest.mark.parametrize("name", ["limit", "after"])
@pytest.mark.parametrize("value", ["0", "-1", str(2**63), "9" * 5000, "zyxcanary", "1.5", "NaN"])
def test_a_page_that_cannot_be_is_422(client: TestClient, name: str, value: str) -> None:
    body_of(client.get("/history", params={name: value}), 422, "validation_error")


def test_a_filter_that_is_not_known_is_422(client: TestClient) -> None:
    body_of(client.get("/history", params={"stauts": "zyxcanary"}), 422, "validation_error")
    body_of(client.get("/history", params={"status": "zyxcanary"}), 422, "validation_error")


@pytest.mark.parametrize(
    ("address", "needed"),
    [
        ("/history?order=rank", "q"),
        ("/history?after_score=1&after=9", "order=rank"),
        ("/history?after_score=1&after=9&q=zyxcanary", "order=rank"),
        ("/history?after_score=0&q=zyxcanary&order=rank", "after"),
        ("/stats?limit=100", "by=user"),
        ("/stats?limit=1&by=model", "by=user"),
    ],
)
def test_what_would_do_nothing_alone_is_422(client: TestClient, address: str, needed: str) -> None:
    (item,) = body_of(client.get(address), 422, "validation_error")["detail"]
    assert needed in item["msg"]


def test_statistics_have_no_limit_unless_by_user(client: TestClient) -> None:
    assert client.get("/stats").status_code == 200
    assert client.get("/stats?by=model").status_code == 200
    assert client.get("/stats?by=user&limit=1").status_code == 200


@pytest.mark.parametrize("given", ["a", "A-b_c.9", "x" * 128])
def test_a_sane_request_id_comes_back(client: TestClient, given: str) -> None:
    answer = client.get("/history/0", headers={"X-Request-ID": given})
    assert body_of(answer, 422, "validation_error")["request_id"] == given


@pytest.mark.parametrize(
    "given",
    [b"", b"two words", b"x" * 129, b"x" * 200, b"a\x01b", b"a\tb", b"\xff", b"a;b", b"<b>"],
)
def test_another_request_id_is_replaced(client: TestClient, given: bytes) -> None:
    answer = client.get("/history/0", headers={b"X-Request-ID": given})
    found = body_of(answer, 422, "validation_error")["request_id"]
    assert re.fullmatch(r"[0-9a-f]{32}", found)


def test_the_openapi_document_tells_the_body_of_every_answer(client: TestClient) -> None:
    for path, operations in client.get("/openapi.json").json()["paths"].items():
        for method, operation in operations.items():
            told = operation["responses"]
            bare = {status for status, found in told.items() if "content" not in found}
            assert bare <= {"204"}, (method, path)


def takes_text(parameter: dict[str, Any]) -> bool:
    return parameter["in"] != "header" and "maxLength" in str(parameter["schema"])


def test_the_openapi_document_tells_every_error_in_its_shape(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert "HTTPValidationError" not in document["components"]["schemas"]
    shape = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            told = operation["responses"]
            if not path.startswith(("/health", "/metrics")):
                errors = {status: found for status, found in told.items() if status >= "400"}
                assert [found["content"] for found in errors.values()] == [shape] * len(errors)
                assert "422" in errors, (method, path)
            if "requestBody" in operation:
                assert {"400", "408", "413", "415"} <= told.keys(), (method, path)
            if any(takes_text(parameter) for parameter in operation.get("parameters", ())):
                assert "400" in told, (method, path)  # of a NUL character
