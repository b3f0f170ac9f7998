"""Export and import: everything comes along, once, whatever is interrupted or broken."""

import contextlib
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from database import Database, transaction
from errors import CommandError, StorageUnavailableError
from models import Base, Conversation, GenerationRecord, HistoryQuery, Status
from repositories import cached, checks, conversations, records, removal
from repositories.transfer import LEFT
from services import arriving, importing, transfer
from services.helper import Helper
from services.leases import LeaseKeeper
from services.lines import NO_ROW, conversation_line, record_line
from tests.databases import KINDS
from tests.prepared import prepared_database
from tests.service import ROOT
from tests.test_history import NOON, OWNER, insert

NOT_MOVED = LEFT | {"lease_id"}
NO_TEXT = "CAST(x'ff63616e617279' AS TEXT)"  # "canary" after what UTF-8 never has


def nothing(done: int, total: int) -> None:
    """No progress bar."""


def exported(database: Database, owner: str | None = None, **query: Any) -> bytes:
    out = io.BytesIO()
    transfer.export_to(database, out, owner, HistoryQuery(**query), nothing)
    return out.getvalue()


def lines_of(text: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def import_lines(database: Database, text: bytes, skipped: list[str] | None = None) -> Any:
    skip = None if skipped is None else skipped.append
    return importing.Importer(database, skip).run(io.BytesIO(text), nothing)


def fill(database: Database) -> None:
    """Records and conversations of two owners, with gaps in their ids."""
    with database.sessions() as session:
        for number in range(3):
            with transaction(session):
                conversations.add(
                    session,
                    "somebody else" if number == 2 else OWNER,
                    title=f"Über {number}",
                    title_pending=[None, True, False][number],
                    initial_prompt="Erzähl" if number else None,
                    model_type="gpt2",
                    created_at=NOON,
                    updated_at=NOON + timedelta(microseconds=number),
                )
        insert(session, conversation_id=1, prompt="🐉\n\"'\\ \u2028", completion="")
        gone = insert(session)
        insert(session, user_id="anna ", conversation_id=2, seed=0, duration_ms=17)
        insert(session, owner="somebody else", conversation_id=3, status=Status.FAILED)
        insert(
            session,
            status=Status.IN_PROGRESS,
            lease_id=4711,
            completion=" half",
            created_at=NOON.replace(microsecond=0),
            parameters={"top_p": 0.1, "stop": ["\n\t", "ß"], "temperature": 1.0, "top_k": 0},
        )
        with transaction(session):
            assert removal.remove(session, OWNER, gone)


def show(session: Session, record_id: int) -> int:
    """An answer from the cache that shows a record's text."""
    with transaction(session):
        source = records.get(session, OWNER, record_id)
        assert source is not None
        times = {"created_at": NOON, "updated_at": NOON}
        return cached.add(session, OWNER, source, duration_ms=1, **times).id


@pytest.mark.parametrize("source", KINDS)
def test_a_move_to_another_database_and_on_gives_the_same_bytes(
    source: str, database: Database, tmp_path: Path
) -> None:
    (tmp_path / "first").mkdir()
    with prepared_database(source, tmp_path / "first") as url:
        first = Database(url)
        first.migrate()
        fill(first)
        with first.sessions() as session:
            show(session, insert(session, prompt="Es war", attempts=2))
        moved = exported(first)
        first.close()
    done = import_lines(database, moved)
    assert (done.records, done.conversations, done.present) == (6, 3, 0)
    assert exported(database) == moved


def test_importing_twice_changes_nothing(database: Database) -> None:
    fill(database)
    before = exported(database)
    again = import_lines(database, before)
    assert (again.records, again.conversations, again.present) == (0, 0, 7)
    assert exported(database) == before


def test_new_ids_go_on_after_imported_ones(database: Database) -> None:
    line = record(1000)
    import_lines(database, written(line, conversation(500)))
    with database.sessions() as session:
        assert insert(session) == 1001
        with transaction(session):
            added = conversations.add(
                session, OWNER, title="t", model_type="m", created_at=NOON, updated_at=NOON
            )
        assert added.id == 501
    import_lines(database, written(record(7)))
    with database.sessions() as session:
        assert insert(session) == 1002


def test_a_broken_line_takes_no_ids(database: Database) -> None:
    broken = record(1000, conversation_id=99), conversation(0)
    import_lines(database, written(*broken, record(7)), [])
    with database.sessions() as session:
        assert insert(session) == 8


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("kind", "line", "fields"),
    [(GenerationRecord, record_line, {"completion"}), (Conversation, conversation_line, set())],
)
def test_every_column_comes_along_or_is_known_not_to(
    kind: type[Base], line: Any, fields: set[str], database: Database
) -> None:
    columns = {column.name for column in kind.__table__.columns}
    fill(database)
    with database.sessions() as session:
        row = session.execute(select(kind.__table__)).mappings().first()
    assert columns - set(json.loads(line(row))) == (NOT_MOVED | fields) & columns


def record(id: Any = 1, **given: Any) -> dict[str, Any]:
    """A line with nothing but what the contract names."""
    values: dict[str, Any] = {
        "id": id,
        "prompt": "Once",
        "generated_text": "Once upon",
        "model_name": "gpt2",
        "created_at": "2026-01-01T12:00:00Z",
        "status": "completed",
        "finish_reason": "stop",
        "user_id": None,
        "conversation_id": None,
        "prompt_tokens": 1,
        "completion_tokens": 2,
        "total_tokens": 3,
        "cached": False,
        "seed": 1,
        "duration_ms": None,
    }
    return values | given


def conversation(id: int, **given: Any) -> dict[str, Any]:
    values = {
        "object": "conversation",
        "id": id,
        "title": "t",
        "model_type": "gpt2",
        "created_at": "2026-01-01T12:00:00Z",
    }
    return values | given


def written(*lines: Any) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def deep(levels: int) -> Any:
    return {"stop": deep(levels - 1)} if levels else []


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (b"{", "no JSON object"),
        (b"[]", "no JSON object"),
        (b"17", "no JSON object"),
        (b"\xff{}", "no JSON object"),
        (b"\xef\xbb\xbf{}", "no JSON object"),
        (record("2"), "id: "),
        (record(0), "id: "),
        (record(2**53), "id: "),
        (record(2, canary4711=1), "canary4711: "),
        (record(2, status="done"), "status: "),
        (record(2, status="queued"), "status: "),
        (record(2, prompt="a\0b"), "prompt: "),
        (b'{"id": 2, "prompt": "\\ud800"}', "no JSON object"),
        (record(2, seed=-1), "seed: "),
        (record(2, seed=2**63), "seed: "),
        (record(2, seed=float("inf")), "seed: "),
        (record(2, prompt_tokens=True), "prompt_tokens: "),
        (record(2, created_at="yesterday"), "created_at: "),
        (record(2, parameters=[]), "parameters: "),
        (record(2, parameters={"top_p": [float("nan")]}), "parameters: "),
        (
            written(record(2, parameters={"top_p": 9})).strip().replace(b"9}", b"1e999}"),
            "not finite",
        ),
        (record(2, parameters=deep(21)), "more than 20 levels deep"),
        (record(2, parameters=deep(150)), "more than 20 levels deep"),
        (record(2, model_name="x" * 201), "model_name: "),
        (record(2, generated_text="Twice"), "does not begin with the prompt"),
        (record(2, total_tokens=4), "total_tokens is not the sum"),
        (record(2, conversation_id=99), "its conversation, 99, is not there"),
        (record(2, conversation_id=5, owner_id="another"), "its conversation, 5, is not there"),
        (record(1, created_at="2026-01-01T12:00:01Z"), "another row has its id, 1"),
        (record(1, owner_id="another"), "another row has its id, 1"),
        (conversation(5, owner_id="another"), "another row has its id, 5"),
        (conversation(6, title=""), "title: "),
        (record(2, object="message"), "no JSON object"),
    ],
)
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_broken_line_is_named_and_stops_or_is_left_out(
    database: Database, broken: Any, reason: str
) -> None:
    line = broken + b"\n" if isinstance(broken, bytes) else written(broken)
    text = written(conversation(5), record(1)) + line + written(record(3))
    with pytest.raises(CommandError, match=r"^line 3: [^\n]*" + reason) as caught:
        import_lines(database, text)
    assert "Once" not in str(caught.value)
    assert [found["id"] for found in lines_of(exported(database))] == [5, 1]
    skipped: list[str] = []
    done = import_lines(database, text, skipped)
    assert (done.broken, done.records, done.present) == (1, 1, 2)
    assert [found["id"] for found in lines_of(exported(database))] == [5, 1, 3]
    assert skipped == [str(caught.value)]


def test_a_file_that_an_editor_wrote_comes_in(database: Database) -> None:
    """With a byte order mark, the line ends of Windows, and blank lines, which count as lines."""
    lines = written(record(1), record(2)).replace(b"\n", b"\r\n\r\n  \n") + b"\n{\r\n"
    with pytest.raises(CommandError, match=r"^line 8: "):
        import_lines(database, b"\xef\xbb\xbf" + lines)
    assert [line["id"] for line in lines_of(exported(database))] == [1, 2]
    assert import_lines(database, b"\xef\xbb\xbf").records == 0


def test_a_text_may_speak_of_nan(database: Database) -> None:
    import_lines(database, written(record(1, generated_text="Once NaN, Infinity")))
    assert lines_of(exported(database))[0]["generated_text"] == "Once NaN, Infinity"


def test_parameters_may_be_deep(database: Database) -> None:
    usual = {"max_new_tokens": 50, "temperature": 1.0, "top_k": 50, "top_p": 1.0}
    given = [usual | {"repetition_penalty": 1.0} | deep(19), deep(19)]
    import_lines(database, written(*(record(id, parameters=of) for id, of in enumerate(given, 1))))
    assert [line["parameters"] for line in lines_of(exported(database))] == given


def test_lines_of_the_contract_alone_are_enough(database: Database) -> None:
    import_lines(database, written(record(5)))
    (found,) = lines_of(exported(database))
    assert {name: found[name] for name in record()} == record(5)
    assert found["owner_id"] == OWNER


def test_a_row_that_changed_since_stays_as_it_is(database: Database) -> None:
    import_lines(database, written(record(1)))
    with database.sessions() as session, transaction(session):
        session.get_one(GenerationRecord, 1).completion = " corrected"
    assert import_lines(database, written(record(1))).present == 1
    assert lines_of(exported(database))[0]["generated_text"] == "Once corrected"


def refuse_seed(database: Database, seed: int) -> None:
    """Make the database refuse what no line's reader would."""
    rule = f"ALTER TABLE generation_records ADD CHECK (seed <> {seed})"
    if database.file is not None:
        rule = (
            "CREATE TRIGGER refuse BEFORE INSERT ON generation_records"
            f" WHEN NEW.seed = {seed} BEGIN SELECT RAISE(ABORT, 'no'); END"
        )
    with database.sessions() as session, transaction(session):
        session.execute(text(rule))


def test_a_line_that_the_database_refuses_is_named_and_stops_or_is_left_out(
    database: Database,
) -> None:
    refuse_seed(database, 4711)
    lines = written(*(record(id, seed=4711 if id in (3, 6) else 1) for id in range(1, 8)))
    with pytest.raises(CommandError, match=r"^line 3: the database refuses it \(\w+\)$"):
        import_lines(database, lines)
    assert [line["id"] for line in lines_of(exported(database))] == [1, 2]
    skipped: list[str] = []
    done = import_lines(database, lines, skipped)
    assert (done.records, done.present, done.broken) == (3, 2, 2)
    assert [line["id"] for line in lines_of(exported(database))] == [1, 2, 4, 5, 7]
    assert [named.partition(":")[0] for named in skipped] == ["line 3", "line 6"]


@pytest.mark.parametrize("database_url", ["mysql"], indirect=True)
def test_a_text_that_is_too_large_for_the_database_is_a_broken_line(database: Database) -> None:
    with database.sessions() as session:
        large = "Once" + "x" * session.scalars(text("SELECT @@max_allowed_packet")).one()
    skipped: list[str] = []
    lines = written(record(1), record(2, generated_text=large), record(3))
    assert import_lines(database, lines, skipped).records == 2
    assert [named.partition(" (")[0] for named in skipped] == ["line 2: the database refuses it"]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_full_database_is_no_broken_line(database: Database) -> None:
    with database.engine.connect() as connection:
        pages = connection.scalar(text("PRAGMA page_count"))
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    skipped: list[str] = []
    with pytest.raises(StorageUnavailableError):
        import_lines(database, written(record(1, generated_text="Once" + "x" * 100_000)), skipped)
    assert skipped == []


@pytest.mark.parametrize("database_url", ["postgresql", "mysql"], indirect=True)
def test_two_imports_at_once_bring_each_row_once(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = written(conversation(1), record(1, conversation_id=1), record(2))
    look = importing.Known

    def look_too_early(*given: Any) -> Any:
        monkeypatch.setattr(importing, "Known", look)
        found = look(*given)
        assert import_lines(database, lines).records == 2
        return found

    monkeypatch.setattr(importing, "Known", look_too_early)
    assert import_lines(database, lines).present == 3
    assert exported(database).count(b"\n") == 3


def test_what_was_in_progress_is_closed_where_it_came_to(database: Database) -> None:
    line = record(1, status="in_progress", finish_reason=None)
    import_lines(database, written(line))
    LeaseKeeper(database).sweep()
    (found,) = lines_of(exported(database))
    assert (found["status"], found["finish_reason"]) == ("incomplete", "interrupted")


def test_filters_and_owners_choose_records_and_their_conversations(database: Database) -> None:
    fill(database)

    def chosen(owner: str | None = None, **query: Any) -> list[tuple[str, int]]:
        return [
            (line["object"][0], line["id"]) for line in lines_of(exported(database, owner, **query))
        ]

    assert chosen(user_id="anna ") == [("c", 2), ("r", 3)]
    assert chosen(status=Status.FAILED) == [("c", 1), ("c", 2), ("c", 3), ("r", 4)]
    assert chosen("somebody else") == [("c", 3), ("r", 4)]
    assert chosen("nobody") == []
    assert chosen(OWNER, status=Status.FAILED) == [("c", 1), ("c", 2)]
    assert chosen(created_before=NOON) == [("r", 5)]


def test_a_record_that_ends_during_an_export_brings_its_conversation(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(database)
    with database.sessions() as session:
        running = insert(session, conversation_id=1, status=Status.IN_PROGRESS, lease_id=1)
    read_records = transfer.record_lines

    def end_first(*given: Any) -> Any:
        with database.sessions() as session, transaction(session):
            records.finish(session, OWNER, running, status=Status.CANCELLED)
        return read_records(*given)

    monkeypatch.setattr(transfer, "record_lines", end_first)
    lines = lines_of(exported(database, status=Status.CANCELLED))
    assert [(line["object"], line["id"]) for line in lines if line["id"] in (1, running)] == [
        ("conversation", 1),
        ("record", running),
    ]


def test_large_texts_are_exported_few_at_a_time(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch is all that an export has in memory, in each of its processes."""
    large = "x" * 10_000
    threads = [conversation(id, initial_prompt=large) for id in range(1, 10)]
    asked = [record(id, generated_text="Once" + large) for id in range(1, 10)]
    import_lines(database, written(*threads, *asked, *(record(id) for id in range(10, 30))))
    with database.sessions() as session:
        for _ in range(9):
            show(session, 9)  # its text is counted though the row holds none
    whole = exported(database)
    monkeypatch.setattr(transfer, "BATCH_TEXT", 25_000)
    place = transfer.Place()
    parts = [*transfer.export_lines(database, None, HistoryQuery(), place, 38, nothing)]
    assert max(map(len, parts)) < 40_000
    assert max(part.count(b"\n") for part in parts) > 4
    assert b"".join(parts) == whole


def test_a_file_that_is_whole_is_not_written_again(database: Database, tmp_path: Path) -> None:
    import_lines(database, written(record(1)))
    file = tmp_path / "history.ndjson"
    transfer.export_file(database, file, None, HistoryQuery(), nothing)
    with pytest.raises(CommandError, match="is there already"):
        transfer.export_file(database, file, None, HistoryQuery(), nothing)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_file_has_one_export_at_a_time(database: Database, tmp_path: Path) -> None:
    import_lines(database, written(record(1)))
    file = tmp_path / "history.ndjson"
    refused = []

    def export_too(done: int, total: int) -> None:
        with pytest.raises(CommandError, match="another export is writing"):
            transfer.export_file(database, file, None, HistoryQuery(), nothing)
        refused.append(done)

    transfer.export_file(database, file, None, HistoryQuery(), export_too)
    assert refused == [1, 1]
    assert file.read_bytes() == exported(database)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("kept", [0, 1, 100, 300, 900, 1600])
def test_a_file_that_was_cut_off_goes_on_after_its_last_whole_line(
    database: Database, tmp_path: Path, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "BATCH_ROWS", 1)
    monkeypatch.setattr(transfer, "TAIL_BYTES", 64)
    fill(database)
    whole, file = exported(database), tmp_path / "history.ndjson"
    note = tmp_path / "history.ndjson.unfinished"

    def die(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transfer.export_file(database, file, None, HistoryQuery(), die)
    file.write_bytes(whole[:kept])
    with database.sessions() as session:
        insert(session)  # after the export began: not in it
    with pytest.raises(CommandError, match="other filters"):
        transfer.export_file(database, file, OWNER, HistoryQuery(), nothing)
    transfer.export_file(database, file, None, HistoryQuery(), nothing)
    assert file.read_bytes() == whole
    assert not note.exists()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("noted", [b"", b"{", b"[]", b'{"owner": null}', b"\xff"])
def test_a_note_that_cannot_be_read_ends_the_export_in_words(
    database: Database, tmp_path: Path, noted: bytes
) -> None:
    file, note = tmp_path / "history.ndjson", tmp_path / "history.ndjson.unfinished"
    file.write_bytes(b"{")
    note.write_bytes(noted)
    with pytest.raises(CommandError, match=r"cannot be read: remove it and .*ndjson, and export"):
        transfer.export_file(database, file, None, HistoryQuery(), nothing)
    assert file.read_bytes() == b"{"


def test_an_export_killed_again_and_again_has_every_line_once(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'records.db'}")
    database.migrate()
    import_lines(database, written(*(record(id) for id in range(1, 30_001))))
    file = tmp_path / "history.ndjson"
    command = [sys.executable, "-m", "manage", "export", "--out", str(file)]
    environment = os.environ | {"DATABASE_URL": f"sqlite:///{tmp_path / 'records.db'}"}
    kills = 0
    while True:
        had = file.stat().st_size if file.exists() else 0
        process = subprocess.Popen(command, cwd=ROOT, env=environment)
        while process.poll() is None and kills < 2:
            if file.exists() and file.stat().st_size > had:
                process.kill()
                kills += 1
                break
            time.sleep(0.001)
        if process.wait() == 0:
            break
    assert kills == 2
    assert [line["id"] for line in lines_of(file.read_bytes())] == list(range(1, 30_001))
    assert file.read_bytes() == exported(database)
    database.close()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (
            f"generation_records SET prompt = {NO_TEXT} WHERE id = 4",
            "record 4",
        ),
        ("generation_records SET parameters = '{canary' WHERE id = 3", "record 3"),
        ("generation_records SET parameters = '17' WHERE id = 5", "record 5"),
        ("generation_records SET created_at = 'canary' WHERE id = 1", "record 1"),
        (
            f"conversations SET title = {NO_TEXT} WHERE id = 2",
            "conversation 2",
        ),
    ],
)
def test_a_row_that_cannot_be_read_is_named_and_not_shown(
    database: Database, damage: str, name: str
) -> None:
    fill(database)
    assert database.file is not None
    with contextlib.closing(sqlite3.connect(database.file)) as connection:
        for trigger in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'"):
            connection.execute(f"DROP TRIGGER {trigger[0]}")
        connection.execute(f"UPDATE {damage}")
        connection.commit()
    with pytest.raises(CommandError, match=f"^{name} cannot be read: [^\n]*$") as caught:
        exported(database)
    assert "canary" not in "".join(traceback.format_exception(caught.value))


def test_an_answer_from_the_cache_comes_along_without_a_second_copy(database: Database) -> None:
    with database.sessions() as session:
        source = insert(session, prompt="Es war", completion=" einmal")
        shown = show(session, source)
    line = lines_of(exported(database))[1]
    assert (line["generated_text"], line["cached"], line["source_id"]) == (
        "Es war einmal",
        True,
        source,
    )
    whole = exported(database)
    with database.sessions() as session, transaction(session):
        removal.remove(session, OWNER, shown)
        removal.remove(session, OWNER, source)
    import_lines(database, whole)
    assert exported(database) == whole
    columns = text("SELECT prompt, completion FROM generation_records WHERE id = :id")
    with database.sessions() as session:
        assert tuple(session.execute(columns, {"id": shown}).one()) == ("", "")


def test_an_answer_whose_source_stayed_behind_has_its_own_text(database: Database) -> None:
    with database.sessions() as session:
        source = insert(session, prompt="Es war", completion=" einmal")
        shown = show(session, source)
    _, line = exported(database).splitlines(keepends=True)
    with database.sessions() as session, transaction(session):
        removal.remove(session, OWNER, shown)
        removal.remove(session, OWNER, source)
    import_lines(database, line)
    (found,) = lines_of(exported(database))
    assert (found["id"], found["generated_text"], found["source_id"]) == (
        shown,
        "Es war einmal",
        None,
    )


def test_an_answer_keeps_its_text_where_its_source_is_there_without_one(
    database: Database,
) -> None:
    """A later export has another source for it: one that shows a text here, and holds none."""
    linked = {"cached": True, "source_id": 3}
    import_lines(database, written(record(3), record(5, **linked)))
    import_lines(database, written(record(5), record(6, **linked | {"source_id": 5})))
    found = [(line["id"], line["generated_text"]) for line in lines_of(exported(database))]
    assert found == [(number, "Once upon") for number in (3, 5, 6)]
    with database.sessions() as session:
        assert checks.sourceless(session) == 0


def mortal(answers: int) -> tuple[type[Helper], list[bool]]:
    """A helper that is ready at once and is killed after some answers; and which it gave."""
    helped: list[bool] = []

    class Mortal(Helper):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            assert self.pipe.poll(60)

        def ask(self, question: Any) -> None:
            if len(helped) == answers:
                self.process.kill()
                self.process.join()
            super().ask(question)

        def answer(self) -> Any:
            rows = super().answer()
            helped.append(rows is not None)
            return rows

    return Mortal, helped


def test_a_second_process_exports_the_same_and_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper, helped = mortal(2)
    monkeypatch.setattr(transfer, "Helper", helper)
    monkeypatch.setattr(transfer, "BATCH_ROWS", 1)
    database = Database(f"sqlite:///{tmp_path / 'records.db'}")
    database.migrate()
    fill(database)
    whole, of_owner = exported(database), exported(database, OWNER)
    assert helped == []
    monkeypatch.setattr(transfer, "ALONE_BATCHES", 0)
    assert exported(database) == whole
    assert helped == [True, True]
    assert exported(database, OWNER) == of_owner
    assert not all(helped)
    database.close()


def test_a_second_process_prepares_the_same_and_is_not_missed(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(database)
    with database.sessions() as session:
        show(session, insert(session, prompt="Es war"))
    whole = exported(database)
    with database.sessions() as session, transaction(session):
        session.execute(text("DELETE FROM generation_records WHERE source_id IS NOT NULL"))
        session.execute(text("DELETE FROM generation_records"))
        session.execute(text("DELETE FROM conversations"))
    helper, helped = mortal(7)
    monkeypatch.setattr(arriving, "Helper", helper)
    monkeypatch.setattr(arriving, "ALONE_BYTES", 0)
    monkeypatch.setattr(arriving, "BATCH_BYTES", 1)  # a line
    skipped: list[str] = []
    done = import_lines(database, b"{\n" + whole, skipped)
    assert (done.records, done.conversations, skipped) == (6, 3, [f"line 1: {NO_ROW}"])
    assert exported(database) == whole
    assert helped == [True] * 7 + [False] * 3


def test_the_second_process_ends_with_the_first() -> None:
    helper = Helper(arriving.preparing, "sqlite")
    assert helper.pipe.poll(60)
    helper.pipe.close()
    helper.process.join(60)
    assert helper.process.exitcode == 0


def test_the_second_process_is_not_told_of_an_interruption() -> None:
    with Helper(arriving.preparing, "sqlite") as helper:
        assert helper.process.pid is not None
        os.kill(helper.process.pid, signal.SIGINT)  # while it starts
        assert helper.pipe.poll(60)
        os.kill(helper.process.pid, signal.SIGINT)
        helper.ask([b""])
        assert helper.answer() == [None]


def test_a_second_process_that_cannot_do_it_only_falls_silent() -> None:
    with Helper(
        transfer.exporting, "sqlite:///no/such/folder/x.db", 1.0, None, HistoryQuery()
    ) as h:
        assert h.pipe.poll(60)
        h.ask((0, 10))
        assert h.answer() is None
