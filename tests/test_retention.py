"""What has been kept long enough goes, exactly that, and holds nobody up."""

import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import event, select, text
from sqlalchemy.orm import Session

from database import Database, release, transaction
from models import (
    Conversation,
    GenerationRecord,
    HistoryQuery,
    MessageUpdate,
    Page,
    Record,
    Status,
)
from repositories import cached, conversations, keys, records, removal, transfer
from services import history, retention
from services.conversations import change_message
from services.planning import turns_of
from services.retention import Limits, Removed, Retention
from tests.service import ROOT, sessions_of
from tests.test_history import OWNER, insert
from tests.test_transfer import exported, import_lines, record, show, written

NOW = datetime.now(UTC)
OLD = NOW - timedelta(days=40)
MIDDLE = NOW - timedelta(days=20)
BOTH = Limits(records=NOW - timedelta(days=30), texts=NOW - timedelta(days=10))


def thread(session: Session, moment: datetime, **given: Any) -> int:
    values = {"title": "Of words", "model_type": "m", "created_at": moment, "updated_at": moment}
    with transaction(session):
        return conversations.add(session, OWNER, **values | given).id


def fill(session: Session) -> dict[str, int]:
    """One record of each kind that matters, and who holds what."""
    with_old = thread(session, OLD, initial_prompt="words")
    with_pinned, with_middle = thread(session, OLD), thread(session, MIDDLE)
    empty_old, empty_new = thread(session, OLD), thread(session, NOW)
    made = {
        "old": insert(session, created_at=OLD, conversation_id=with_old),
        "old of another": insert(session, created_at=OLD, owner="somebody else"),
        "old failed": insert(session, created_at=OLD, status=Status.FAILED),
        "old in progress": insert(session, created_at=OLD, status=Status.IN_PROGRESS, lease_id=7),
        "old pinned": insert(session, created_at=OLD, pinned=True, conversation_id=with_pinned),
        "middle": insert(session, created_at=MIDDLE, conversation_id=with_middle),
        "middle pinned": insert(session, created_at=MIDDLE, pinned=True),
        "new": insert(session, created_at=NOW, prompt="words that stay"),
    }
    titles = {"with_old": with_old, "with_pinned": with_pinned, "with_middle": with_middle}
    return made | titles | {"empty_old": empty_old, "empty_new": empty_new}


def kept(session: Session, kind: Any = GenerationRecord) -> set[int]:
    session.rollback()
    return set(session.scalars(select(kind.id)))


def run(database: Database, limits: Limits) -> Removed:
    removed = Retention(database, None, None).run(limits)
    assert removed is not None
    return removed


def test_what_is_old_goes_and_the_dry_run_has_counted_it(database: Database) -> None:
    with database.sessions() as session:
        made = fill(session)
        counted = retention.count(database, BOTH)
        assert run(database, BOTH) == counted == Removed(3, 1, 2, 1)
        assert kept(session) == {
            made[name] for name in made if name.startswith(("old i", "old p"))
        } | {
            made["middle"],
            made["middle pinned"],
            made["new"],
        }
        assert kept(session, Conversation) == {
            made[name] for name in ("with_pinned", "with_middle", "empty_new")
        }
    assert run(database, BOTH) == retention.count(database, BOTH) == Removed()


def test_a_record_without_its_text_says_so_and_keeps_its_numbers(database: Database) -> None:
    with database.sessions() as session:
        made = fill(session)
        before = Record.model_validate(history.get(session, OWNER, made["middle"]))
        session.rollback()
        run(database, BOTH)
        session.expire_all()
        after = Record.model_validate(history.get(session, OWNER, made["middle"]))
        assert (after.prompt, after.generated_text) == ("", "")
        assert after.text_removed_at is not None
        changed = {"prompt", "generated_text", "text_removed_at", "updated_at"}
        assert after.model_dump(exclude=changed) == before.model_dump(exclude=changed)
        assert history.get(session, OWNER, made["middle pinned"]).prompt == "Once"
        named = session.get_one(Conversation, made["with_middle"])
        assert (named.title, named.initial_prompt) == ("Text removed", None)
        assert session.get_one(Conversation, made["with_pinned"]).title == "Of words"


def test_a_text_that_is_written_anew_goes_as_well(database: Database) -> None:
    with database.sessions() as session:
        written = insert(session, created_at=MIDDLE, conversation_id=thread(session, NOW))
        run(database, BOTH)
        change_message(session, OWNER, written, MessageUpdate(response_content="A secret"))
        again = history.get(session, OWNER, written)
        assert (again.completion, again.text_removed_at) == ("A secret", None)
        release(session)
        assert run(database, BOTH).texts == 1
        gone = history.get(session, OWNER, written)
        assert (gone.completion, gone.text_removed_at is None) == ("", False)


def test_what_went_is_not_found_by_its_words(database: Database) -> None:
    with database.sessions() as session:
        made = fill(session)
        run(database, BOTH)
        found, _ = history.page(session, OWNER, HistoryQuery(q="once", limit=100))
        assert {record.id for record in found} == {made["old pinned"], made["middle pinned"]}


def test_texts_that_later_answers_show_stay_with_those(database: Database) -> None:
    with database.sessions() as session:
        sources = [insert(session, created_at=moment, prompt="Es war") for moment in (OLD, MIDDLE)]
        shown = [show(session, source) for source in sources]
        for later in shown:
            with transaction(session):
                session.get_one(GenerationRecord, later).created_at = NOW
        session.rollback()
    removed = run(database, BOTH)
    assert (removed.records, removed.texts) == (1, 1)
    with database.sessions() as session:
        for later in shown:
            assert history.get(session, OWNER, later).generated_text == "Es war upon a time"


@contextmanager
def updates(database: Database) -> Iterator[list[int]]:
    """How many records each statement of the block has changed."""
    changed: list[int] = []

    def count(_: Any, cursor: Any, sql: str, *__: Any) -> None:
        if sql.startswith("UPDATE generation_records"):
            changed.append(cursor.rowcount)

    event.listen(database.engine, "after_cursor_execute", count)
    yield changed
    event.remove(database.engine, "after_cursor_execute", count)


def answer_often(session: Session, old: int, new: int, **given: Any) -> int:
    """A text that so many answers from the cache show."""
    record = insert(session, created_at=OLD, **given)
    source = history.get(session, OWNER, record)
    session.rollback()
    with transaction(session):
        for number in range(old + new):
            times = dict.fromkeys(("created_at", "updated_at"), OLD if number < old else NOW)
            cached.add(session, OWNER, source, duration_ms=1, **times, **given)
    return record


@pytest.mark.parametrize("what", ["records", "texts"])
def test_a_text_that_was_answered_often_is_handed_over_once(database: Database, what: str) -> None:
    with database.sessions() as session:
        answer_often(session, 150, 150)
    with updates(database) as changed:
        removed = run(database, Limits(**{what: MIDDLE}))
    assert getattr(removed, what) == 151
    assert sum(changed) < 500
    with database.sessions() as session:
        shown = [record for record in session.scalars(select(GenerationRecord)) if record.prompt]
        assert [record.generated_text for record in shown] == ["Once upon a time"] * 150
        assert {record.source_id for record in shown} == {None, min(record.id for record in shown)}


def test_a_stop_string_is_text_too(database: Database) -> None:
    parameters = {"stop": ["canary4711"], "top_k": 3}
    with database.sessions() as session:
        record = insert(session, created_at=OLD, parameters=parameters)
        run(database, Limits(texts=NOW))
        session.expire_all()
        assert history.get(session, OWNER, record).parameters == {"stop": [], "top_k": 3}


WAITING = {
    "postgresql": "pg_stat_activity"
    " WHERE datname = current_database() AND wait_event_type = 'Lock'",
    "mysql": "information_schema.innodb_trx JOIN information_schema.processlist"
    " ON id = trx_mysql_thread_id WHERE db = database() AND trx_state = 'LOCK WAIT'",
}


@pytest.mark.parametrize("database_url", WAITING, indirect=True)
def test_what_comes_into_an_old_conversation_meanwhile_stays(database: Database) -> None:
    """What comes holds the conversation, so that it is not deleted, but does not change it."""
    with database.sessions() as session, ThreadPoolExecutor() as threads:
        empty = thread(session, OLD)
        comes = insert(session, created_at=NOW)
        with transaction(session):
            session.get_one(GenerationRecord, comes).conversation_id = empty
            session.flush()
            running = threads.submit(run, database, BOTH)
            wait_until_waiting(database, running)
        assert running.result() == Removed()
        assert kept(session) == {comes}
        assert kept(session, Conversation) == {empty}


def wait_until_waiting(database: Database, last: Future[Any], count: int = 1) -> None:
    """Until so many transactions wait for locks, or what would be the last of them has ended."""
    mysql = database.engine.dialect.name in ("mysql", "mariadb")
    waiting = WAITING["mysql" if mysql else "postgresql"]
    with database.engine.connect() as connection:
        statement = text(f"SELECT count(*) FROM {waiting}")
        while (connection.scalar(statement) or 0) < count and not last.done():
            connection.rollback()
            time.sleep(0.2)  # MariaDB looks anew only when nobody has asked for 0.1 s


def remove_texts(database: Database, record_ids: list[int]) -> None:
    with database.sessions() as session, transaction(session):
        removal.remove_texts(session, record_ids, NOW)


@pytest.mark.parametrize("database_url", WAITING, indirect=True)
def test_a_text_that_goes_while_an_answer_with_it_is_imported_stays_with_that(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_lines(database, written(record(3)))
    go_on, removing = transfer.go_on_after, list[Future[None]]()

    def meanwhile(*given: Any) -> None:
        if not removing:
            removing.append(threads.submit(remove_texts, database, [3]))
            wait_until_waiting(database, removing[0])
        go_on(*given)

    monkeypatch.setattr(transfer, "go_on_after", meanwhile)
    with ThreadPoolExecutor() as threads:
        import_lines(database, written(record(5, cached=True, source_id=3)))
        removing[0].result()
    with database.sessions() as session:
        texts = [history.get(session, OWNER, id).generated_text for id in (3, 5)]
    assert texts == ["", "Once upon"]


@pytest.mark.parametrize("database_url", WAITING, indirect=True)
@pytest.mark.parametrize("what", ["record", "text"])
def test_an_answer_that_goes_while_its_source_does_inherits_nothing(
    database: Database, what: str
) -> None:
    with database.sessions() as session, ThreadPoolExecutor() as threads:
        source = insert(session, prompt="Es war")
        leaves, stays = show(session, source), show(session, source)

        def delete() -> None:
            with database.sessions() as another:
                history.delete(another, OWNER, source)

        with transaction(session):
            if what == "record":
                removal.remove(session, OWNER, leaves)
            else:
                removal.remove_texts(session, [leaves], NOW)
            deleting = threads.submit(delete)
            wait_until_waiting(database, deleting)
        deleting.result()
        session.expire_all()
        found = [(record.id, record.generated_text) for record in all_records(session)]
    assert found == [(leaves, "")] * (what == "text") + [(stays, "Es war upon a time")]


READS: dict[str, Callable[[Session, int], Any]] = {
    "alone": lambda session, _: history.get(session, OWNER, 2),
    "by its key": lambda session, _: keys.find(session, OWNER, "key"),
    "in its thread": lambda session, thread: conversations.messages(
        session, OWNER, thread, Page(limit=1)
    )[0][0],
}


@pytest.mark.parametrize("read", READS)
def test_an_answer_has_its_text_while_its_source_goes(database: Database, read: str) -> None:
    with database.sessions() as session:
        source, conversation = insert(session), thread(session, NOW)
        answer = show(session, source)
        with transaction(session):
            record = session.get_one(GenerationRecord, answer)
            record.conversation_id, record.idempotency_key = conversation, "key"

    def remove_source(*_: Any) -> None:
        with database.sessions() as another:
            history.delete(another, OWNER, source)

    with database.sessions() as session:
        event.listen(database.engine, "after_cursor_execute", remove_source, once=True)
        assert READS[read](session, conversation).generated_text == "Once upon a time"


def all_records(session: Session) -> Sequence[GenerationRecord]:
    return session.scalars(select(GenerationRecord).order_by(GenerationRecord.id)).all()


@pytest.mark.parametrize("database_url", WAITING, indirect=True)
def test_a_text_that_goes_while_it_is_corrected_is_what_the_correction_says(
    database: Database,
) -> None:
    with database.sessions() as session, ThreadPoolExecutor() as threads:
        message = insert(session, conversation_id=thread(session, NOW))

        def correct() -> tuple[str, datetime | None]:
            with database.sessions() as another:
                request = MessageUpdate(response_content=" again")
                changed = change_message(another, OWNER, message, request)
                return changed.generated_text, changed.text_removed_at

        with transaction(session):
            removal.remove_texts(session, [message], NOW)
            correcting = threads.submit(correct)
            wait_until_waiting(database, correcting)
        assert correcting.result() == (" again", None)
        session.expire_all()
        found = history.get(session, OWNER, message)
        assert (found.generated_text, found.text_removed_at) == (" again", None)


def test_one_of_many_does_it(database: Database, database_url: str) -> None:
    other = Database(database_url)
    with other.alone("retention") as alone:
        assert alone
        assert Retention(database, 1, None).run(BOTH) is None
    assert run(database, BOTH) == Removed()
    other.close()


def test_pins_and_removed_texts_are_moved(database: Database) -> None:
    with database.sessions() as session:
        fill(session)
        run(database, Limits(texts=NOW - timedelta(days=10)))
    whole = exported(database)
    with database.sessions() as session, transaction(session):
        removal.remove_all(session, sorted(kept_in(session)))
    import_lines(database, whole)
    assert exported(database) == whole


def kept_in(session: Session) -> set[int]:
    return set(session.scalars(select(GenerationRecord.id)))


def test_a_service_removes_by_its_settings(database: Database) -> None:
    with database.sessions() as session:
        made = fill(session)
        Retention(database, None, None).tick()
        assert made["old"] in kept(session)
        service = Retention(database, 30, None)
        service.tick()
        assert made["old"] not in kept(session)
        assert history.get(session, OWNER, made["middle"]).prompt == "Once"
        session.rollback()
        with transaction(session):
            records.pin(session, OWNER, made["old pinned"], False, NOW)
        service.tick()
        assert made["old pinned"] not in kept(session)


def test_pinning_twice_is_pinning_and_only_ones_own(client: TestClient) -> None:
    with sessions_of(client)() as session:
        record, theirs = insert(session), insert(session, owner="somebody else")
    for _ in range(2):
        answer = client.post(f"/history/{record}/pin")
        assert (answer.status_code, answer.json()["pinned"]) == (200, True)
    for _ in range(2):
        assert client.delete(f"/history/{record}/pin").status_code == 204
    assert client.get(f"/history/{record}").json()["pinned"] is False
    for call in (client.post, client.delete):
        assert call(f"/history/{theirs}/pin").json()["detail"] == "Record not found"
        assert call("/history/4711/pin").status_code == 404


def test_a_reply_reads_past_removed_texts(session: Session) -> None:
    there = insert(session)
    gone = insert(session)
    with transaction(session):
        removal.remove_texts(session, [gone], NOW)
    session.expire_all()
    thread_now = [history.get(session, OWNER, record) for record in (gone, there)]
    assert turns_of(thread_now) == [("Once", " upon a time")]


def test_a_removed_text_is_not_run_again(client: TestClient) -> None:
    record = client.post("/generate", json={"prompt": "Once"}).json()["id"]
    with sessions_of(client)() as session, transaction(session):
        removal.remove_texts(session, [record], NOW)
    answer = client.post(f"/history/{record}/replay")
    assert (answer.status_code, answer.json()["code"]) == (409, "conflict")


RUN = """
import os
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from database import Database
from services import retention
retention.BATCH_SECONDS = 0.002
database = Database(os.environ["DATABASE_URL"])
database.expect_schema()
print("begun", flush=True)
print(retention.Retention(database, None, None).run(retention.Limits(records=datetime.now(UTC))))
"""


def removing(url: str) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(
        [sys.executable, "-c", RUN],
        cwd=ROOT,
        env=os.environ | {"DATABASE_URL": url},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    return process


def many(database: Database, count: int) -> None:
    with database.sessions() as session:
        first = insert(session, created_at=OLD, prompt="word " * 60)
        row = dict(session.execute(select(GenerationRecord.__table__)).mappings().one())
        session.rollback()
    line = exported(database)
    assert row["id"] == first
    lines = (line.replace(b'"id":1,', b'"id":%d,' % id) for id in range(2, count + 1))
    import_lines(database, b"".join(lines))


def test_a_run_that_is_killed_is_finished_by_the_next(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'records.db'}"
    database = Database(url)
    database.migrate()
    many(database, 3000)
    process = removing(url)
    while len(lines := exported(database).splitlines()) == 3000:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    left = len(lines)
    assert 0 < left < 3000
    with database.sessions() as session:
        assert len(kept(session)) == retention.count(database, Limits(records=NOW)).records
    run(database, Limits(records=NOW))
    assert exported(database) == b""
    database.close()


def size(file: Path) -> int:
    """Of the file, once what the log holds is in it."""
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return file.stat().st_size


def test_space_is_given_back(tmp_path: Path) -> None:
    file = tmp_path / "records.db"
    database = Database(f"sqlite:///{file}")
    database.migrate()
    many(database, 3000)
    with database.sessions() as session:
        first = kept(session).pop()
        session.rollback()
        with transaction(session):
            records.pin(session, OWNER, first, True, NOW)
    full = size(file)
    assert run(database, Limits(records=NOW)).records == 2999
    assert size(file) < full / 2
    with database.sessions() as session:
        assert kept(session) == {first}
    database.close()
