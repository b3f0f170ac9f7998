"""What is kept is found again: filters, pages, deletion, on every database."""

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import Session

from database import Database, transaction
from errors import NotFoundError
from models import FinishReason, GenerationRecord, HistoryQuery, Record, Status
from repositories import records
from services import history
from tests.service import in_process, sessions_of

OWNER = "local"
NOON = datetime(2026, 1, 1, 12, 0, 0, 123456, UTC)


def insert(session: Session, owner: str = OWNER, **given: Any) -> int:
    """One completed record, its own transaction."""
    values: dict[str, Any] = {
        "user_id": None,
        "prompt": "Once",
        "completion": " upon a time",
        "model_name": "tiny-gpt2",
        "model_fingerprint": "0" * 16,
        "dtype": "float32",
        "parameters": {"top_k": 50},
        "seed": 2**63 - 1,
        "prompt_tokens": 1,
        "completion_tokens": 3,
        "created_at": NOON,
        "updated_at": NOON,
        "lease_id": None,
    }
    with transaction(session):
        record = records.add(session, owner, **{"status": Status.COMPLETED} | values | given)
    return record.id


def ids(session: Session, owner: str = OWNER, **query: Any) -> list[int]:
    found, _ = history.page(session, owner, HistoryQuery(limit=100).model_copy(update=query))
    session.rollback()
    return [record.id for record in found]


def test_a_record_comes_back_as_it_was_stored(session: Session) -> None:
    text = "🐉 straße Ω 你好\n\t'\"\\ \u200b\u0301" + "x" * 70_000
    stored = insert(session, prompt=text, completion=text, user_id="Zoë")
    session.expire_all()
    record = Record.model_validate(history.get(session, OWNER, stored))
    assert record.prompt == text
    assert record.generated_text == text + text
    assert record.user_id == "Zoë"
    assert record.created_at == NOON
    assert record.created_at.utcoffset() == timedelta(0)
    assert record.seed == 2**63 - 1


def test_times_are_answered_in_utc_with_an_offset(session: Session) -> None:
    tokyo = NOON.astimezone(datetime.now().astimezone().tzinfo)
    record = history.get(session, OWNER, insert(session, created_at=tokyo))
    assert Record.model_validate(record).model_dump_json().count("2026-01-01T12:00:00.123456Z") == 1


def test_the_list_is_newest_first_by_id_whatever_the_clock_says(session: Session) -> None:
    made = [insert(session, created_at=NOON - timedelta(days=day)) for day in range(3)]
    assert ids(session) == made[::-1]


def test_each_filter_finds_its_own(session: Session) -> None:
    plain = insert(session)
    of_user = insert(session, user_id="anna")
    failed = insert(session, status=Status.FAILED)
    other_model = insert(session, model_name="gpt2")
    late = insert(session, created_at=NOON + timedelta(microseconds=1))
    early = insert(session, created_at=NOON - timedelta(microseconds=1))
    assert ids(session, user_id="anna") == [of_user]
    assert ids(session, user_id="Anna") == []
    assert ids(session, user_id="anna ") == []
    assert ids(session, status=Status.FAILED) == [failed]
    assert ids(session, model_name="gpt2") == [other_model]
    assert ids(session, created_after=NOON) == [late]
    assert ids(session, created_before=NOON) == [early]
    assert ids(session, created_after=NOON, created_before=NOON) == []
    assert ids(session, user_id="anna", status=Status.FAILED) == []
    assert plain in ids(session, status=Status.COMPLETED, model_name="tiny-gpt2")


def test_nobody_sees_what_another_owner_has(database: Database, session: Session) -> None:
    theirs = insert(session, owner="somebody else")
    assert ids(session) == []
    with pytest.raises(NotFoundError):
        history.get(session, OWNER, theirs)
    with pytest.raises(NotFoundError):
        asyncio.run(history.read(database.reader, OWNER, theirs))
    session.rollback()
    with pytest.raises(NotFoundError):
        history.delete(session, OWNER, theirs)
    assert ids(session, owner="somebody else") == [theirs]


def test_a_deleted_record_is_gone_and_its_id_is_not_used_again(
    database_url: str, database: Database
) -> None:
    with database.sessions() as session:
        first, last = insert(session), insert(session)
        history.delete(session, OWNER, last)
        with pytest.raises(NotFoundError):
            history.get(session, OWNER, last)
        session.rollback()
        with pytest.raises(NotFoundError):
            history.delete(session, OWNER, last)
        assert ids(session) == [first]
    database.close()
    again = Database(database_url)
    again.migrate()
    with again.sessions() as session:
        assert insert(session) > last
    again.close()


def test_an_end_is_written_once(session: Session) -> None:
    record = insert(session, status=Status.IN_PROGRESS, completion="")
    ending = {"status": Status.COMPLETED, "finish_reason": FinishReason.STOP, "completion": "a"}
    with transaction(session):
        assert not records.finish(session, "somebody else", record, **ending)
        assert records.finish(session, OWNER, record, **ending)
        assert not records.finish(session, OWNER, record, **ending | {"completion": "b"})
    session.expire_all()
    assert history.get(session, OWNER, record).completion == "a"


def pages(session: Session, limit: int, **query: Any) -> Iterator[list[int]]:
    after = None
    while True:
        asked = HistoryQuery(limit=limit, after=after, **query)
        records, more = history.page(session, OWNER, asked)
        found = [record.id for record in records]
        session.rollback()
        yield found
        if not more:
            return
        after = found[-1]


SINCE = NOON - timedelta(days=1)
BEFORE_THAT = {"created_at": NOON - timedelta(days=2)}
# What is asked, and what a record has that it does not let through.
QUERIES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"user_id": "anna"}, {"user_id": "bert"}),
    ({"status": Status.COMPLETED, "created_after": SINCE}, {"status": Status.FAILED}),
    ({"created_after": SINCE}, BEFORE_THAT),
    ({"q": "upon"}, {"completion": " again"}),
    ({"q": "upon", "user_id": "anna"}, {"user_id": "bert"}),
    ({"q": "once tim*", "created_after": SINCE}, BEFORE_THAT),
]


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    asked=st.sampled_from(QUERIES),
    wanted=st.lists(st.booleans(), max_size=12),
    limit=st.integers(1, 5),
    between=st.lists(st.one_of(st.booleans(), st.integers(0, 11)), max_size=6),
)
def test_changes_while_paging_neither_skip_nor_repeat(
    session: Session,
    asked: tuple[dict[str, Any], dict[str, Any]],
    wanted: list[bool],
    limit: int,
    between: list[bool | int],
) -> None:
    """Between pages a record is inserted (wanted or not) or one of the first is deleted (its
    place)."""
    query, other = asked

    def add(wanted: bool) -> int:
        return insert(session, **{"user_id": "anna"} | ({} if wanted else other))

    with transaction(session):
        session.query(GenerationRecord).delete()
    made = [(add(fits), fits) for fits in wanted]
    there = [record for record, fits in made if fits or not other]
    kept, seen = set(there), list[int]()
    changes = iter(between)
    for page in pages(session, limit, **query):
        seen += page
        assert seen == sorted(set(seen), reverse=True)
        change = next(changes, None)
        if isinstance(change, bool):
            add(change)
        elif change is not None and change < len(there) and there[change] in kept:
            history.delete(session, OWNER, there[change])
            kept.discard(there[change])
    assert kept <= set(seen) <= set(there)


def link(answer: Any) -> str | None:
    found = answer.links.get("next")
    return None if found is None else str(found["url"])


def test_the_link_leads_to_the_end_and_keeps_the_filters(database_url: str) -> None:
    with in_process(DATABASE_URL=database_url) as own, sessions_of(own)() as session:
        wanted = [insert(session, user_id="ä & b/?", status=Status.FAILED) for _ in range(5)]
        insert(session, user_id="ä & b/?")
        url: str | None = "/history"
        query: dict[str, Any] = {"user_id": "ä & b/?", "status": "failed", "limit": 2}
        found: list[int] = []
        while url is not None:
            answer = own.get(url, params=query) if query else own.get(url)
            assert answer.status_code == 200
            found += [record["id"] for record in answer.json()]
            url, query = link(answer), {}
        assert found == wanted[::-1]


def test_a_users_history_is_the_last_ten(client: TestClient) -> None:
    with sessions_of(client)() as session:
        made = [insert(session, user_id="of eleven") for _ in range(11)]
    answer = client.get("/users/of eleven/history")
    assert [record["id"] for record in answer.json()] == made[:0:-1]
    assert answer.json()[0] == client.get(f"/history/{made[-1]}").json()
    rest = client.get(str(link(answer)))
    assert [record["id"] for record in rest.json()] == made[:1]
    assert link(rest) is None
    assert client.get("/users/nobody/history").json() == []


@pytest.mark.parametrize("user", ["анна", "a>b", "two words", "100%", "what?", "#1"])
def test_the_link_leads_on_whatever_a_user_is_called(client: TestClient, user: str) -> None:
    with sessions_of(client)() as session:
        made = [insert(session, user_id=user) for _ in range(2)]
    first = client.get(f"/users/{quote(user)}/history?limit=1")
    assert [record["id"] for record in first.json()] == made[1:]
    rest = client.get(str(link(first)))
    assert [record["id"] for record in rest.json()] == made[:1]


@pytest.mark.parametrize("user", ["org/anna", "/", "org/anna/history", "a//b", "a.b/..c", "..."])
@pytest.mark.parametrize("kept", ["/", ""])
def test_a_user_id_may_hold_slashes(client: TestClient, user: str, kept: str) -> None:
    made = client.post("/generate", json={"prompt": "Once", "user_id": user}).json()
    path = quote(user, safe=kept)
    found = client.get(f"/users/{path}/history").json()
    assert [record["id"] for record in found] == [made["id"]]
    assert client.post(f"/analyze/{path}", json={"text": "Once"}).status_code == 200
    assert client.delete(f"/users/{path}").json()["records"] == 2
    assert client.get(f"/users/{path}/history").json() == []


@pytest.mark.parametrize("user", [".", "..", "a/../b", "./a", "a/."])
def test_a_user_id_that_clients_fold_out_of_paths_is_422(client: TestClient, user: str) -> None:
    path = quote(user, safe="").replace(".", "%2E")
    answers = [
        client.post("/generate", json={"prompt": "Once", "user_id": user}),
        client.request("DELETE", f"/users/{path}"),
    ]
    for answer in answers:
        assert answer.status_code == 422
        assert "must not be . or .." in answer.json()["detail"][0]["msg"]


def test_the_document_names_a_users_paths_plainly(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    for path in ("/users/{user_id}/history", "/users/{user_id}", "/analyze/{user_id}"):
        (operation,) = paths[path].values()
        (parameter, *_) = operation["parameters"]
        assert (parameter["name"], parameter["in"]) == ("user_id", "path")


def test_delete_is_204_then_404(client: TestClient) -> None:
    with sessions_of(client)() as session:
        record = insert(session)
    answer = client.delete(f"/history/{record}")
    assert (answer.status_code, answer.content) == (204, b"")
    for again in (client.delete(f"/history/{record}"), client.get(f"/history/{record}")):
        assert (again.status_code, again.json()["detail"]) == (404, "Record not found")


def test_the_list_has_ten_unless_told(client: TestClient) -> None:
    with sessions_of(client)() as session:
        for _ in range(12):
            insert(session)
    assert len(client.get("/history").json()) == 10
    assert len(client.get("/history?limit=11").json()) == 11
