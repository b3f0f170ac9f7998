"""A backup is whole, replaces nothing, and holds what was stored before it began."""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.backup_drill import drill
from benchmarks.promises import broken
from database import Database
from errors import CommandError
from models import Status
from services import backup, history, server_backup, sqlite_backup
from services.leases import LeaseKeeper
from tests.databases import KINDS, fresh_database, server_url
from tests.test_history import insert
from tests.test_transfer import exported, fill, nothing


@pytest.mark.parametrize("kind", KINDS)
def test_a_backup_under_load_holds_what_was_acknowledged_before(kind: str, tmp_path: Path) -> None:
    if kind != "sqlite":
        server_url(kind)
    counts = drill(kind, 1, tmp_path)
    assert counts["compared"] > 0
    assert counts["written meanwhile"] > 0
    assert broken(counts) == {}


@pytest.fixture
def empty(database: Database, tmp_path: Path) -> Iterator[Database]:
    """Another database of the same kind, without tables."""
    folder = tmp_path / "other"
    folder.mkdir()
    kind = database.url.get_backend_name().replace("mariadb", "mysql")
    with fresh_database(kind, folder) as url:
        opened = Database(url)
        yield opened
        opened.close()


def test_a_restored_database_is_the_same(
    database: Database, empty: Database, tmp_path: Path
) -> None:
    fill(database)
    backup.back_up(database, tmp_path / "backup", nothing)
    assert backup.restore(empty, tmp_path / "backup", nothing) == 4
    empty.expect_schema()
    assert exported(empty) == exported(database)
    with database.sessions() as session, empty.sessions() as other:
        assert insert(other) == insert(session)  # ids go on


def test_what_was_in_progress_is_closed_in_the_copy_and_goes_on_in_the_original(
    database: Database, empty: Database, tmp_path: Path
) -> None:
    keeper = LeaseKeeper(database)
    keeper.sweep()
    with database.sessions() as session:
        record = insert(session, status=Status.IN_PROGRESS, lease_id=keeper.lease_id)
    backup.back_up(database, tmp_path / "backup", nothing)
    backup.restore(empty, tmp_path / "backup", nothing)
    LeaseKeeper(empty).sweep()
    LeaseKeeper(database).sweep()
    for opened, status in ((database, "in_progress"), (empty, "incomplete")):
        with opened.sessions() as session:
            assert history.find(session, None, record).status == status


def test_nothing_that_is_there_is_replaced(database: Database, tmp_path: Path) -> None:
    fill(database)
    file = tmp_path / "backup"
    backup.back_up(database, file, nothing)
    kept, before = file.read_bytes(), exported(database)
    with pytest.raises(CommandError, match="is there already"):
        backup.back_up(database, file, nothing)
    with pytest.raises(CommandError, match="already; a restore"):
        backup.restore(database, file, nothing)
    assert file.read_bytes() == kept
    assert exported(database) == before


def test_two_backups_at_once_to_one_file_are_one(database: Database, tmp_path: Path) -> None:
    file = tmp_path / "backup"
    with backup.drafted(file) as draft:  # as another process has it
        with pytest.raises(CommandError, match="another process writes"):
            backup.back_up(database, file, nothing)
        draft.write_bytes(b"whole")
    assert file.read_bytes() == b"whole"


def test_a_file_that_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    file = tmp_path / "records.db"
    with pytest.raises(CommandError, match="is there already"), backup.drafted(file):
        file.write_bytes(b"of a service")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"of a service"]


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_of_a_backup_that_was_interrupted_or_killed_nothing_stays(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(database)
    folder = tmp_path / "backups"
    folder.mkdir()
    with monkeypatch.context() as patch:
        for name in ("read_through", "expect_end"):
            patch.setattr(server_backup, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            backup.back_up(database, folder / "backup", interrupted)
    assert list(folder.iterdir()) == []
    with (folder / "backup.partial").open("wb") as left:  # by one that was killed
        backup.back_up(database, folder / "backup", nothing)
        whole = (folder / "backup").read_bytes()
        left.write(b"more")  # by a program that the killed one had started
    assert [path.name for path in folder.iterdir()] == ["backup"]
    assert (folder / "backup").read_bytes() == whole


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_full_disk_is_no_fault_of_a_backup(
    database: Database, empty: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object, target: Path, __: object) -> None:
        with contextlib.closing(sqlite3.connect(target, isolation_level=None)) as connection:
            connection.execute("PRAGMA max_page_count=1")
            connection.execute("CREATE TABLE too_much (x)")

    backup.back_up(database, tmp_path / "backup", nothing)
    monkeypatch.setattr(sqlite_backup, "copy_state", full)
    with pytest.raises(CommandError, match=r"could not be copied \(database or disk is full\)$"):
        backup.restore(empty, tmp_path / "backup", nothing)
    assert list((tmp_path / "other").iterdir()) == []


def test_a_backup_that_is_cut_short_is_refused(
    database: Database, empty: Database, tmp_path: Path
) -> None:
    fill(database)
    file = tmp_path / "backup"
    backup.back_up(database, file, nothing)
    file.write_bytes(file.read_bytes()[: -file.stat().st_size // 3])
    with pytest.raises(CommandError):
        backup.restore(empty, file, nothing)
    assert empty.file is None or not empty.file.exists()
    assert empty.is_empty()


@pytest.mark.parametrize("database_url", ["postgresql", "mysql"], indirect=True)
def test_a_damaged_dump_leaves_nothing_and_none_of_its_rows_is_shown(
    database: Database, empty: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number that is none any more, amid texts; in a file that is not packed, as MySQL's."""
    run = server_backup.run
    monkeypatch.setattr(
        server_backup,
        "run",
        lambda url, name, *given, **more: run(
            url, name, *given, *["--compress=0"] * (name == "pg_dump"), **more
        ),
    )
    fill(database)
    with database.sessions() as session:
        insert(session, prompt="canary4711", seed=4711471147114711)
        insert(session, prompt="canary4711")
    file = tmp_path / "backup"
    backup.back_up(database, file, nothing)
    sound = file.read_bytes()
    file.write_bytes(sound.replace(b"4711471147114711", b"4711canary471147"))
    with pytest.raises(CommandError, match=r"^\w+ failed: (ERROR|COPY failed)") as caught:
        backup.restore(empty, file, nothing)
    assert "canary" not in str(caught.value)
    assert empty.is_empty()
    file.write_bytes(sound)
    assert backup.restore(empty, file, nothing) == 6


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_database_in_use_is_no_backup(
    database: Database, empty: Database, tmp_path: Path
) -> None:
    fill(database)
    assert database.file is not None
    with pytest.raises(CommandError, match="in use"):
        backup.restore(empty, database.file, nothing)


@pytest.mark.parametrize("database_url", ["postgresql", "mysql"], indirect=True)
def test_a_program_that_is_not_there_is_named(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CommandError, match=r"^(pg_dump|mysqldump) is not on the PATH"):
        backup.back_up(database, tmp_path / "backup", nothing)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("database_url", ["postgresql", "mysql"], indirect=True)
def test_a_password_is_on_no_command_line(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The programs' place is taken by one that notes how it was called, and fails."""
    for name in ("pg_dump", "mysqldump"):
        fake = tmp_path / name
        fake.write_text(f'#!/bin/sh\necho "$0 $*" > {tmp_path}/called; echo no >&2; exit 3\n')
        fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(CommandError, match=r"failed: no$") as caught:
        server_backup.dump(database.url.set(password="canary4711"), tmp_path / "backup")
    called = (tmp_path / "called").read_text()
    assert database.url.database is not None
    assert database.url.database in called
    assert "canary4711" not in called + str(caught.value)
