"""The operator's command line, run as operators run it."""

import contextlib
import io
import json
import logging
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

import manage
from database import Database
from services.statistics import UsageFolder
from tests.service import ROOT, Server
from tests.test_history import NOON, insert
from tests.test_transfer import record


class Command:
    """``python -m manage …`` in this process."""

    def __init__(self, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[bytes]) -> None:
        self.patch = patch
        self.capture = capture
        self.error = ""

    def __call__(self, url: str, *arguments: str, stdin: bytes = b"") -> object:
        """Its exit status, or the line that it ends with."""
        self.patch.setenv("DATABASE_URL", url)
        self.patch.setattr(sys, "argv", ["manage", *arguments])
        self.patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        try:
            manage.main()
        except SystemExit as exit:
            return exit.code
        raise AssertionError("it did not exit")

    def done(self, url: str, *arguments: str, stdin: bytes = b"") -> bytes:
        """What a command that succeeds prints."""
        self.capture.readouterr()
        status = self(url, *arguments, stdin=stdin)
        out, error = self.capture.readouterr()
        self.error = error.decode()
        assert status in (0, None), (status, error)
        return out


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> Iterator[Command]:
    level = logging.getLogger().level
    yield Command(monkeypatch, capsysbinary)
    logging.getLogger().setLevel(level)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'records.db'}"


def test_a_database_is_made_filled_shown_and_moved(
    command: Command, url: str, tmp_path: Path
) -> None:
    command.done(url, "migrate")
    database = Database(url)
    with database.sessions() as session:
        record = insert(session, prompt="Zoë says")
    database.close()
    shown = json.loads(command.done(url, "show", str(record)))
    assert (shown["id"], shown["generated_text"]) == (record, "Zoë says upon a time")
    moved = command.done(url, "export")
    other = f"sqlite:///{tmp_path / 'other.db'}"
    command.done(other, "migrate")
    command.done(other, "import", stdin=moved)
    assert command.done(other, "export", "--created-after", "2025-12-31T00:00+02:00") == moved


def test_records_are_searched_counted_removed_and_erased(
    command: Command, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command.done(url, "migrate")
    database = Database(url)
    with database.sessions() as session:
        record = insert(session, prompt="Zoë says", user_id="anna")
        old = insert(session, created_at=NOON.replace(year=2001))
        insert(session)
    database.close()
    found = json.loads(command.done(url, "search", "zoe SAYS"))
    assert (found["id"], found["prompt"]) == (record, "Zoë says")
    assert command.done(url, "search", "zoe", "--owner", "nobody") == b""
    assert command.done(url, "stats", "--by", "user", "--bucket", "day").count(b"\n") <= 2
    monkeypatch.setenv("RETENTION_DAYS", "9000")
    for option, there in (("--dry-run", True), ("--no-dry-run", False)):
        assert command.done(url, "retention", option).startswith(b"records: 1\n")
        assert (f'"id":{old},'.encode() in command.done(url, "export")) is there
    assert command.done(url, "erase", "anna") == b"records: 1\nconversations: 0\ncleared: True\n"
    assert command.done(url, "search", "zoe") == b""
    assert command.done(url, "check").count(b": ok\n") == 11


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("show", "4711"), "Record not found"),
        (("show", "4711", "--owner", "me"), "Record not found"),
        (("export", "--created-after", "noon"), "created_after: "),
        (("import",), "line 1: "),
        (("search", "--", "-zoe"), "q: "),
        (("retention",), "Neither RETENTION_DAYS nor"),
        (("export", "--out", "/nowhere/x"), "/nowhere/x: No such file or directory"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    command: Command, url: str, arguments: tuple[str, ...], line: str
) -> None:
    Database(url).migrate()
    ended = command(url, *arguments, stdin=b"?")
    assert isinstance(ended, str)
    assert ended.startswith(line)
    assert "\n" not in ended


@pytest.mark.parametrize(
    "arguments",
    [
        ("show", "9" * 20),
        ("show", "0"),
        ("import", "/"),
        ("erase", ""),
        ("erase", "\udcff"),  # as Python has bytes that are no text where it runs
        ("show", "1", "--owner", "\udcff"),
        ("search", "once", "--owner", "\udcff"),
        ("stats", "--owner", ""),
    ],
)
def test_an_argument_that_cannot_be_is_said_to_be(
    command: Command, url: str, arguments: tuple[str, ...]
) -> None:
    Database(url).migrate()
    assert command(url, *arguments) == 2
    assert b"Invalid value for" in command.capture.readouterr().err


@pytest.mark.parametrize("arguments", [("show", "1"), ("search", "zoë")])
def test_json_is_utf_8_wherever_it_is_printed(url: str, arguments: tuple[str, ...]) -> None:
    database = Database(url)
    database.migrate()
    with database.sessions() as session:
        insert(session, prompt="Zoë sagt 你好")
    database.close()
    line = [sys.executable, "-m", "manage", *arguments]
    environment = os.environ | {"DATABASE_URL": url, "PYTHONIOENCODING": "latin-1"}
    found = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True)
    assert json.loads(found.stdout)["prompt"] == "Zoë sagt 你好", found.stderr


def test_an_export_notes_its_filters_in_whatever_locale(url: str, tmp_path: Path) -> None:
    Database(url).migrate()
    out = tmp_path / "history.ndjson"
    given = ["manage", "export", "--user-id", "Zo\xeb", "--out", str(out)]
    line = [sys.executable, "-c", f"import sys, manage; sys.argv = {given!a}; manage.main()"]
    ascii_alone = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment = os.environ | {"DATABASE_URL": url} | ascii_alone
    found = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True)
    assert (found.returncode, found.stderr, out.read_bytes()) == (0, b"", b"")


def test_requests_without_a_user_are_nobodys_to_erase(command: Command, url: str) -> None:
    Database(url).migrate()
    now = datetime.now(UTC).isoformat()
    command.done(url, "import", stdin=json.dumps(record(created_at=now)).encode())
    database = Database(url)
    UsageFolder(database).tick()
    database.close()
    counted = command.done(url, "stats", "--by", "user")
    assert command(url, "erase", "") == 2
    assert command.done(url, "stats", "--by", "user") == counted != b""


def test_a_database_that_fails_in_the_middle_is_one_line(command: Command, url: str) -> None:
    Database(url).migrate()
    with contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as other:
        other.execute("ALTER TABLE generation_records RENAME TO away")
    assert command(url, "show", "1") == "The database failed (OperationalError)"


def test_the_help_names_each_command_in_a_whole_sentence(
    command: Command, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = command.done(url, "--help").decode().partition("Commands:\n")[2].splitlines()
    assert len(shown) == len(manage.app.registered_commands)
    assert [line for line in shown if not line.endswith(".") or line.endswith("...")] == []


@pytest.mark.parametrize("arguments", ["export", "search once", "check"])
def test_output_that_does_not_fit_is_one_line(url: str, arguments: str) -> None:
    database = Database(url)
    database.migrate()
    with database.sessions() as session:
        insert(session)
    database.close()
    line = f'"{sys.executable}" -m manage {arguments} > /dev/full'
    environment = os.environ | {"DATABASE_URL": url}
    found = subprocess.run(line, shell=True, cwd=ROOT, env=environment, capture_output=True)
    assert (found.returncode, found.stderr) == (1, b"No space left on device\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("export >&-", b"standard output is closed\n"),
        ("import <&-", b"standard input is closed\n"),
        ("export --out /nowhere/x >&-", b"/nowhere/x: No such file or directory\n"),
    ],
)
def test_a_stream_that_is_closed_is_one_line(url: str, arguments: str, said: bytes) -> None:
    Database(url).migrate()
    line = f'"{sys.executable}" -m manage {arguments}'
    environment = os.environ | {"DATABASE_URL": url}
    found = subprocess.run(line, shell=True, cwd=ROOT, env=environment, capture_output=True)
    assert (found.returncode, found.stderr) == (1, said)


def test_a_database_that_is_not_there_is_not_made_by_looking(
    command: Command, url: str, tmp_path: Path
) -> None:
    assert "is not there" in str(command(url, "export"))
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_has_enough_is_no_error_of_ours(url: str) -> None:
    Database(url).migrate()
    line = f'"{sys.executable}" -m manage export | true'
    environment = os.environ | {"DATABASE_URL": url}
    found = subprocess.run(line, shell=True, cwd=ROOT, env=environment, capture_output=True)
    assert found.stderr == b""


def test_import_works_beside_a_running_service(command: Command, server: Server) -> None:
    """The service goes on, finds what came in, and gives ids that are free."""
    url = f"sqlite:///{server.log.parent / 'records.db'}"
    first = httpx.post(server.url + "/generate", json={"prompt": "Once"}, timeout=60).json()
    line = dict(first, id=first["id"] + 1000)
    command.done(url, "import", stdin=json.dumps(line).encode())
    assert httpx.get(f"{server.url}/history/{line['id']}").json() == line
    after = httpx.post(server.url + "/generate", json={"prompt": "Once"}, timeout=60).json()
    assert after["id"] > line["id"]
