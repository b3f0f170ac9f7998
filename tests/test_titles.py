"""A title that was made of a message goes with that message's text; one that was given stays."""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy.orm import Session

from database import Database, transaction
from models import (
    Conversation,
    ConversationQuery,
    ConversationUpdate,
    GenerationRecord,
    MessageUpdate,
)
from repositories import conversations, removal
from repositories.titles import OF_FIRST_MESSAGE
from services import conversations as service_of_conversations
from services import erasure, retention
from services.retention import Limits, Removed, Retention
from tests.service import sessions_of
from tests.test_history import OWNER, insert
from tests.test_transfer import show

NOW = datetime.now(UTC)
OLD = NOW - timedelta(days=40)
DAYS = NOW - timedelta(days=30)
FIRST = "Where does canary4711 live?"

Way = Callable[[Database, Session, int], object]


def delete(_: Database, session: Session, message: int) -> None:
    with transaction(session):
        removal.remove(session, OWNER, message)


def erase(database: Database, _: Session, __: int) -> None:
    erasure.erase(database, OWNER, "anna")


def run(limits: Limits) -> Way:
    return lambda database, *_: Retention(database, None, None).run(limits)


WAYS = {
    "delete": delete,
    "erase": erase,
    "records": run(Limits(records=DAYS)),
    "texts": run(Limits(texts=DAYS)),
}
HELD: dict[str, dict[str, Any]] = {
    "pending": {"title": "Where does", "title_pending": True, "initial_prompt": OF_FIRST_MESSAGE},
    "pending by an earlier version": {
        "title": "Where does",
        "title_pending": True,
        "initial_prompt": FIRST,
    },
    "made": {"title": "A canary", "initial_prompt": OF_FIRST_MESSAGE},
    "made by an earlier version": {"title": "A canary", "initial_prompt": FIRST},
}


def thread(session: Session, **given: Any) -> int:
    values = {"title": "Given", "model_type": "m", "created_at": OLD, "updated_at": OLD}
    with transaction(session):
        return conversations.add(session, OWNER, **values | given).id


def say(session: Session, conversation: int, **given: Any) -> int:
    first: dict[str, Any] = {"prompt": FIRST, "user_id": "anna", "created_at": OLD}
    return insert(session, conversation_id=conversation, **first | given)


def later(session: Session, conversation: int) -> int:
    return say(session, conversation, prompt="Thanks.", user_id="bert", created_at=NOW)


def held(session: Session, conversation: int) -> tuple[str, bool | None, str | None]:
    session.rollback()
    session.expire_all()
    found = session.get_one(Conversation, conversation)
    values = found.title, found.title_pending, found.initial_prompt
    session.rollback()
    return values


@pytest.mark.parametrize("values", HELD.values(), ids=HELD)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_title_goes_with_what_it_was_made_of(
    database: Database, way: Way, values: dict[str, Any]
) -> None:
    with database.sessions() as session:
        conversation = thread(session, **values)
        first, _ = say(session, conversation), later(session, conversation)
        way(database, session, first)
        assert held(session, conversation) == ("Text removed", None, None)
        found, _ = conversations_with(session, "canary")
        assert found == []


def conversations_with(session: Session, words: str) -> Any:
    return conversations.page(session, OWNER, ConversationQuery(q=words))


@pytest.mark.parametrize("way", [delete, run(Limits(records=DAYS)), run(Limits(texts=DAYS))])
@pytest.mark.parametrize("prompt", [None, "A client's own"])
def test_what_a_client_gave_stays(database: Database, way: Way, prompt: str | None) -> None:
    with database.sessions() as session:
        conversation = thread(session, initial_prompt=prompt)
        first, _ = say(session, conversation), later(session, conversation)
        way(database, session, first)
        assert held(session, conversation) == ("Given", None, prompt)


@pytest.mark.parametrize("kind", ["pending", "pending by an earlier version"])
def test_of_a_first_message_only_a_title_is_kept(session: Session, kind: str) -> None:
    conversation = thread(session, **HELD[kind])
    say(session, conversation)
    with transaction(session):
        assert conversations.suggest_title(session, conversation, "A canary", NOW)
    assert held(session, conversation) == ("A canary", None, OF_FIRST_MESSAGE)


def test_only_the_first_message_takes_it_along(session: Session) -> None:
    conversation = thread(session, **HELD["made"])
    say(session, conversation)
    second = later(session, conversation)
    with transaction(session):
        removal.remove(session, OWNER, second)
    assert held(session, conversation)[0] == "A canary"


def test_a_first_message_that_was_answered_from_the_cache_takes_it_along(
    session: Session,
) -> None:
    shown = show(session, insert(session, prompt=FIRST))
    conversation = thread(session, **HELD["pending"])
    with transaction(session):
        session.get_one(GenerationRecord, shown).conversation_id = conversation
    with transaction(session):
        removal.remove(session, OWNER, shown)
    assert held(session, conversation) == ("Text removed", None, None)


@pytest.mark.parametrize("values", HELD.values(), ids=HELD)
def test_a_title_set_by_hand_is_a_clients_own(session: Session, values: dict[str, Any]) -> None:
    conversation = thread(session, **values)
    first = say(session, conversation)
    service_of_conversations.change(session, OWNER, conversation, ConversationUpdate(title="Mine"))
    assert held(session, conversation) == ("Mine", None, None)
    with transaction(session):
        removal.remove(session, OWNER, first)
    assert held(session, conversation)[0] == "Mine"


@pytest.mark.parametrize("values", HELD.values(), ids=HELD)
def test_a_corrected_message_leaves_no_copy_of_what_it_said(
    session: Session, values: dict[str, Any]
) -> None:
    conversation = thread(session, **values)
    first = say(session, conversation)
    corrected = MessageUpdate(prompt_content="Where does it live?")
    service_of_conversations.change_message(session, OWNER, first, corrected)
    assert held(session, conversation) == (
        values["title"],
        values.get("title_pending"),
        OF_FIRST_MESSAGE,
    )
    with transaction(session):
        removal.remove(session, OWNER, first)
    assert held(session, conversation)[0] == "Text removed"


def test_whose_prompt_nobody_can_say_goes_with_whoever_took_part(database: Database) -> None:
    with database.sessions() as session:
        conversation = thread(session, initial_prompt=FIRST)
        later(session, conversation)
        say(session, conversation, prompt="And then?")
        erasure.erase(database, OWNER, "anna")
        assert held(session, conversation) == ("Given", None, None)


@pytest.mark.parametrize(
    ("limits", "counted"),
    [
        (Limits(records=DAYS), Removed(records=3, conversations=1, titles=1)),
        (Limits(texts=DAYS), Removed(texts=3, titles=2)),
        (Limits(records=DAYS, texts=DAYS), Removed(records=3, conversations=1, titles=1)),
    ],
)
def test_the_dry_run_counts_titles_too(
    database: Database, limits: Limits, counted: Removed
) -> None:
    with database.sessions() as session:
        both, alone, own = thread(session, **HELD["made"]), thread(session), thread(session)
        for conversation in (both, alone, own):
            say(session, conversation)
        for conversation in (both, own):
            later(session, conversation)
    assert retention.count(database, limits) == counted
    assert Retention(database, None, None).run(limits) == counted


def test_a_service_lets_a_title_go_with_its_first_message(service: TestClient) -> None:
    conversation = service.post("/conversations", json={}).json()["id"]
    path = f"/conversations/{conversation}"
    body = {"prompt_content": FIRST, "max_length": 60}
    first = service.post(f"{path}/messages", json=body).json()["id"]
    deadline = time.monotonic() + 60
    with sessions_of(service)() as session:
        while held(session, conversation)[1] is not None:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert held(session, conversation)[2] == OF_FIRST_MESSAGE
    assert service.delete(f"/messages/{first}").status_code == 204
    assert service.get(path).json()["title"] == "Text removed"
