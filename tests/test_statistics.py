"""What happened is counted exactly: at once, once, whatever becomes of the records."""

import contextlib
import random
import struct
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from fastapi.testclient import TestClient
from sqlalchemy import delete, select, text
from sqlalchemy import insert as insert_rows
from sqlalchemy.orm import Session

from database import Database, transaction
from errors import InvalidRequestError
from models import (
    ConversationCreate,
    FinishReason,
    Statistics,
    StatisticsQuery,
    Status,
    Usage,
    UsageDelta,
    UsageKind,
)
from repositories import busiest, records, usage
from services import conversations, history, statistics
from services.statistics import UsageFolder
from tests.service import ROOT
from tests.test_history import NOON, OWNER, insert
from tests.test_lists import analyze, is_served, plans
from tests.test_retention import WAITING, wait_until_waiting

LATER = NOON + timedelta(days=40)


def asked(session: Session, owner: str = OWNER, **query: Any) -> list[Statistics]:
    times: dict[str, datetime] = {
        "created_after": NOON - timedelta(days=1),
        "created_before": LATER,
    }
    found = statistics.statistics(session, owner, StatisticsQuery(**(times | query)))
    session.rollback()
    return found


def total(session: Session, owner: str = OWNER) -> Statistics | None:
    found = asked(session, owner, bucket="all")
    return found[0] if found else None


@pytest.fixture
def folder(database: Database) -> UsageFolder:
    return UsageFolder(database)


def test_every_ending_is_counted_at_once_and_once(session: Session, folder: UsageFolder) -> None:
    running = insert(session, status=Status.IN_PROGRESS, completion_tokens=0, lease_id=7)
    insert(session, status=Status.IN_PROGRESS, lease_id=8)
    source = insert(session, duration_ms=100)
    insert(session, status=Status.FAILED, duration_ms=300)
    insert(session, status=Status.CANCELLED, duration_ms=200)
    insert(session, prompt="", completion="", source_id=source, duration_ms=1)
    with transaction(session):
        ending = {"status": Status.COMPLETED, "finish_reason": FinishReason.STOP}
        records.finish(session, OWNER, running, completion_tokens=40, duration_ms=5000, **ending)
        records.interrupt(session, [8])
    for _ in range(3):
        found = total(session)
        assert found is not None
        assert found.model_dump(include={*usage.COUNTED, "total_tokens"}) == {
            "requests": 6,
            "failures": 2,
            "cancelled": 1,
            "cached": 1,
            "prompt_tokens": 6,
            "completion_tokens": 40 + 5 * 3,
            "total_tokens": 6 + 40 + 5 * 3,
        }
        assert found.duration_ms is not None
        assert found.duration_ms.model_dump() == {
            "p50": 200,
            "p90": 5000,
            "p95": 5000,
            "p99": 5000,
            "max": 5000,
        }
        folder.tick()


@pytest.mark.parametrize(
    ("milliseconds", "size"), [([], 1), ([65_535, 7], 9), ([65_536, 7], 16), ([7] * 65_536, 8)]
)
def test_milliseconds_take_the_bytes_that_they_need(milliseconds: list[int], size: int) -> None:
    sums = usage.Sums()
    sums.latencies = milliseconds
    kept = usage.packed(sums)
    values, counts = usage.unpacked(kept)
    assert dict(zip(values, counts, strict=True)) == Counter(milliseconds)
    assert list(values) == sorted(values)
    assert len(kept) == size


def test_sums_that_were_kept_with_more_bytes_are_added_to() -> None:
    kept = usage.Sums()
    kept.packed = [struct.pack("<4I", 7, 65_536, 1, 2), struct.pack("<2I", 7, 3)]
    kept.latencies = [8]
    values, counts = usage.unpacked(usage.packed(kept))
    assert dict(zip(values, counts, strict=True)) == {7: 4, 8: 1, 65_536: 2}


def test_sums_that_go_down_are_as_an_earlier_version_reads_them(
    database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with database.sessions() as session:
        for name, milliseconds in (("a", 7), ("b", 65_536), ("c", None)):
            insert(session, model_name=name, duration_ms=milliseconds)
        UsageFolder(database).tick()
        before = sorted(asked(session, by="model"), key=str)
    monkeypatch.setenv("DATABASE_URL", database_url)
    config = Config(ROOT / "alembic.ini")
    command.downgrade(config, "0011")
    statement = text("SELECT name, latencies FROM usage_sums WHERE kind = 'hour' ORDER BY name")
    with database.engine.connect() as connection:
        kept = {name: bytes(latencies) for name, latencies in connection.execute(statement)}
    assert kept == {"a": struct.pack("<2I", 7, 1), "b": struct.pack("<2I", 65_536, 1), "c": b""}
    command.upgrade(config, "head")
    with database.sessions() as session:
        assert sorted(asked(session, by="model"), key=str) == before


def test_what_is_deleted_stays_counted(session: Session, folder: UsageFolder) -> None:
    made = conversations.create(session, OWNER, ConversationCreate(title="a"), "m").id
    insert(session, conversation_id=made)
    record = insert(session)
    before = total(session)
    history.delete(session, OWNER, record)
    folder.tick()
    conversations.delete(session, OWNER, made)
    assert total(session) == before
    assert before is not None
    assert before.requests == 2


def test_a_request_that_fails_to_end_is_not_counted(session: Session) -> None:
    record = insert(session, status=Status.IN_PROGRESS)
    ending = {"status": Status.COMPLETED, "finish_reason": FinishReason.STOP}
    with contextlib.suppress(ZeroDivisionError), transaction(session):
        assert records.finish(session, OWNER, record, **ending)
        _ = 1 / 0
    assert total(session) is None


@pytest.mark.parametrize("folded", [False, True])
def test_buckets_and_groups_hold_what_belongs_to_them(
    session: Session, folder: UsageFolder, folded: bool
) -> None:
    for minutes, model, user in (
        (0, "gpt2", "anna"),
        (59, "gpt2", "bert"),
        (60, "tiny", "anna"),
        (24 * 60, "gpt2", None),
        (26 * 60, "gpt2", "anna"),
        (40 * 24 * 60, "gpt2", "anna"),  # in the last day that is asked for
        (42 * 24 * 60, "gpt2", "anna"),
    ):
        at = NOON + timedelta(minutes=minutes)
        insert(session, model_name=model, user_id=user, created_at=at, duration_ms=minutes)
    insert(session, owner="somebody else")
    if folded:
        folder.tick()
    hour = NOON.replace(minute=0, second=0, microsecond=0)
    day = hour.replace(hour=0)
    days = {0: 3, 1: 2, 40: 1}
    assert [(item.starts_at, item.ends_at, item.requests) for item in asked(session)] == [
        (day + timedelta(n), day + timedelta(n + 1), days[n]) for n in (40, 1, 0)
    ]
    by_hour = asked(session, bucket="hour", created_before=NOON + timedelta(days=1))
    assert [(item.starts_at - hour, item.requests) for item in by_hour] == [
        (timedelta(hours=24), 1),
        (timedelta(hours=1), 1),
        (timedelta(0), 2),
    ]
    by_model = asked(session, by="model", bucket="all")
    assert [(item.model_name, item.requests) for item in by_model] == [("gpt2", 5), ("tiny", 1)]
    first_day = asked(session, by="user", created_before=day + timedelta(days=1))
    assert [(item.user_id, item.requests) for item in first_day] == [("anna", 2), ("bert", 1)]
    assert [item.user_id for item in asked(session, by="user", limit=1)] == ["anna"] * 3
    assert None in [item.user_id for item in asked(session, by="user")]


@pytest.mark.parametrize("days", [300, 700_000])
def test_users_are_found_however_long_the_range(
    session: Session, folder: UsageFolder, days: int
) -> None:
    insert(session, user_id="bert", created_at=NOON - timedelta(days=days))
    for _ in range(2):
        insert(session, user_id="anna")
    folder.tick()
    calendar = datetime(1, 1, 1, tzinfo=UTC)
    found = asked(session, by="user", bucket="all", created_after=calendar)
    assert [(item.user_id, item.requests) for item in found] == [("anna", 2), ("bert", 1)]


def test_percentiles_are_exact(session: Session, folder: UsageFolder) -> None:
    for milliseconds in range(1, 201):
        insert(session, duration_ms=milliseconds)
        if milliseconds == 150:
            folder.tick()
    found = total(session)
    assert found is not None
    assert found.duration_ms is not None
    assert list(found.duration_ms.model_dump().values()) == [100, 180, 190, 198, 200]


def test_processes_that_add_up_at_once_lose_and_double_nothing(database: Database) -> None:
    def work(number: int) -> None:
        with database.sessions() as session:
            for user in range(5):
                insert(session, user_id=f"u{user}", duration_ms=number)
        UsageFolder(database).tick()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(24)))
    UsageFolder(database).tick()
    with database.sessions() as session:
        found = total(session)
        assert found is not None
        assert found.requests == 24 * 5
        assert session.execute(text("SELECT count(*) FROM usage_deltas")).scalar() == 0
        session.rollback()
        assert [item.requests for item in asked(session, by="user")] == [24] * 5


def test_a_forgotten_person_is_in_nobodys_statistics(session: Session, folder: UsageFolder) -> None:
    insert(session, user_id="anna")
    insert(session, user_id="bert")
    folder.tick()
    insert(session, user_id="anna")
    with transaction(session):
        assert usage.forget_user(session, OWNER, "anna") == 1
    folder.tick()
    assert {item.user_id for item in asked(session, by="user")} == {"bert", None}
    found = total(session)
    assert found is not None
    assert found.requests == 3


def test_a_turn_to_add_up_is_found_without_reading_the_sums(
    database: Database, session: Session
) -> None:
    with transaction(session):
        session.execute(insert_rows(Usage), sums_of_days(random.Random(7), 30, 100))
    analyze(session, "usage_sums")
    found = plans(database, session, lambda session: usage.fold(session, 1))
    assert found
    assert [plan for plan in found if not is_served(plan)] == []


@pytest.mark.parametrize("database_url", WAITING, indirect=True)
def test_a_person_who_is_forgotten_while_it_is_added_up_stays_so(database: Database) -> None:
    """Who adds up has read what was noted of her, and waits before it is written."""
    folder, erasing = UsageFolder(database), database.sessions()
    with erasing, database.sessions() as session, ThreadPoolExecutor() as threads:
        insert(session, user_id="bert")
        folder.tick()
        insert(session, user_id="anna")

        def forget() -> None:
            with transaction(erasing):
                usage.forget_user(erasing, OWNER, "anna")

        with transaction(session):
            of_model = select(Usage).where(Usage.kind == UsageKind.MODEL_HOUR)
            session.execute(of_model.with_for_update())
            adding = threads.submit(folder.tick)
            wait_until_waiting(database, adding)
            forgetting = threads.submit(forget)
            wait_until_waiting(database, forgetting, count=2)
        for done in (adding, forgetting):
            done.result()
        named = {(item.user_id, item.requests) for item in asked(session, by="user")}
    assert named == {("bert", 1)}


def sums_of_days(draw: random.Random, days: int, users: int) -> list[dict[str, Any]]:
    """Steady users and such with single busy days, some of them with as many requests."""
    mean = [draw.choice([0.5, 3, 10, 30]) for _ in range(users)]
    return [
        dict.fromkeys(usage.COUNTED, 0)
        | {"owner_id": OWNER, "kind": "user", "hour": 24 * day, "name": f"user-{user}"}
        | {"requests": requests, "latencies": b""}
        for day in range(days)
        for user in range(users)
        if (requests := int(draw.expovariate(1 / mean[user])) * draw.choice([0, 1, 1, 5]))
    ]


def some_notes(draw: random.Random, days: int, users: int) -> list[dict[str, Any]]:
    """Of users who have sums, and of others."""
    return [
        dict.fromkeys(usage.COUNTED, 0)
        | {"owner_id": OWNER, "user_id": draw.choice([None, f"user-{user}", f"new-{user}"])}
        | {"model_name": "m", "created_at": usage.EPOCH + timedelta(days=draw.randrange(days))}
        | {"requests": draw.choice([1, 1, 10, 100])}
        for user in draw.choices(range(users), k=draw.choice([0, 5, 50]))
    ]


def busiest_of(sums: list[dict[str, Any]], notes: list[dict[str, Any]], days: int) -> list[str]:
    requests: Counter[str] = Counter()
    for row in sums:
        requests[row["name"]] += row["requests"] if row["hour"] < 24 * days else 0
    for row in notes:
        requests[row["user_id"] or ""] += row["requests"]
    return sorted(+requests, key=lambda name: (-requests[name], name))


@pytest.mark.parametrize("most_named", [10, 10_000])
def test_the_busiest_are_the_same_however_few_are_added_up(
    session: Session, monkeypatch: pytest.MonkeyPatch, most_named: int
) -> None:
    monkeypatch.setattr(busiest, "MOST_NAMED", most_named)
    guessed = 0
    for seed in range(40):
        draw = random.Random(seed)
        sums, notes = sums_of_days(draw, draw.randint(1, 9), 60), some_notes(draw, 8, 60)
        with transaction(session):
            session.execute(delete(Usage).where(Usage.kind == "user"))
            session.execute(delete(UsageDelta))
            session.connection().execute(insert_rows(Usage), sums)
            if notes:
                session.connection().execute(insert_rows(UsageDelta), notes)
        count = draw.randint(1, 20)
        times = usage.EPOCH, usage.EPOCH + timedelta(days=8)
        candidates = busiest.Days(session, OWNER, *times).candidates(count)
        guessed += candidates is not None and len(candidates) < 40
        found = busiest.users(session, OWNER, *times, count)
        assert found == busiest_of(sums, notes, 8)[:count], seed
        session.rollback()
    assert guessed > 10


def test_the_service_counts_what_it_answers(client: TestClient) -> None:
    def requests() -> int:
        found = client.get("/stats", params={"bucket": "all"}).json()
        return int(found[0]["requests"]) if found else 0

    before = requests()
    assert client.post("/generate", json={"prompt": "Once"}).status_code == 200
    assert requests() == before + 1


@pytest.mark.parametrize(
    "query",
    [
        {"bucket": "hour", "by": "user"},
        {"bucket": "hour", "created_after": "2020-01-01", "created_before": "2021-01-01"},
        {"bucket": "week"},
        {"created_before": "9999-12-31T23:59:59"},
        {"created_before": "0001-01-01"},
    ],
)
def test_what_cannot_be_counted_is_422(client: TestClient, query: dict[str, str]) -> None:
    assert client.get("/stats", params=query).status_code == 422


def test_a_range_is_never_cut_short(session: Session) -> None:
    with pytest.raises(InvalidRequestError):
        asked(session, bucket="hour")
