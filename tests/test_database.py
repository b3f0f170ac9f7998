"""The database: durable settings, honest refusals, migrations in every direction."""

import contextlib
import itertools
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, event, inspect, text

from connections import normalise_url
from database import Database, transaction
from errors import StartError, StorageUnavailableError
from models import Base
from repositories import leases
from services.model_host import MAX_RUNNING
from tests.databases import fresh_database, server_url
from tests.service import ROOT, in_process, places_taken, ready
from tests.test_history import ids, insert


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "records.db"


def on_file(file: Path, timeout: float = 5.0) -> Database:
    database = Database(f"sqlite:///{file}", timeout)
    database.migrate()
    return database


@pytest.mark.parametrize(
    ("given", "driver"),
    [
        ("postgres://u:p@h/d", "postgresql+psycopg"),
        ("postgresql://u:p@h/d", "postgresql+psycopg"),
        ("mysql://u:p@h/d", "mysql+pymysql"),
        ("mariadb://u:p@h/d", "mariadb+pymysql"),
        ("sqlite:///x.db", "sqlite"),
        ("postgresql+psycopg://u:p@h/d?sslmode=require", "postgresql+psycopg"),
        ("postgresql+psycopg2://u:p@h/d", "postgresql+psycopg"),
        ("postgresql+asyncpg://u:p@h/d", "postgresql+psycopg"),
        ("mysql+mysqldb://u:p@h/d", "mysql+pymysql"),
        ("mariadb+mariadbconnector://u:p@h/d", "mariadb+pymysql"),
        ("sqlite+aiosqlite:///x.db", "sqlite"),
    ],
)
def test_urls_of_hosting_platforms_get_the_shipped_driver(given: str, driver: str) -> None:
    assert normalise_url(given).drivername == driver


def test_parts_of_a_url_are_kept() -> None:
    url = normalise_url("postgres://user:p%40ss@host:5433/name?sslmode=require")
    assert (url.username, url.password, url.host, url.port, url.database) == (
        "user",
        "p@ss",
        "host",
        5433,
        "name",
    )
    assert url.query == {"sslmode": "require"}


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///file:x?a=b",
        "sqlite+pysqlcipher://:secret@/x.db",
        "oracle+oracledb://h/d",
        "mssql+pyodbc://h/d",
        "nothing://h/d",
        "mysql://user@host",
        "mariadb://user@host/",
    ],
)
def test_a_url_that_keeps_nothing_is_one_clear_line(url: str) -> None:
    with pytest.raises(StartError, match=r"^DATABASE_URL is not usable[^\n]*$"):
        Database(url)


@pytest.mark.parametrize(
    ("kind", "parameter"),
    [
        ("mysql", "ssl-mode=REQUIRED"),
        ("mysql", "ssl=true"),
        ("postgresql", "ssl=require"),
        ("postgresql", "connect_timeout=soon"),
    ],
)
def test_a_parameter_that_a_driver_does_not_take_is_one_clear_line(
    kind: str, parameter: str
) -> None:
    url = server_url(kind).render_as_string(hide_password=False).partition("?")[0]
    database = Database(f"{url}?{parameter}")
    for ask in (database.migrate, database.expect_schema, database.is_empty):
        with pytest.raises(StartError, match=r"^DATABASE_URL[^\n]*does not take[^\n]*$"):
            ask()
    database.close()


def test_every_sqlite_connection_is_durable(file: Path) -> None:
    database = on_file(file)
    connections = [database.engine.connect() for _ in range(3)]
    for connection in connections:
        found = [
            connection.execute(text(f"PRAGMA {name}")).scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        ]
        assert found == ["wal", 2, 1]
        connection.close()
    database.close()


def test_a_locked_database_is_503_and_then_works_again(file: Path) -> None:
    with in_process(
        DATABASE_URL=f"sqlite:///{file}", DATABASE_TIMEOUT_SECONDS="0.2", MAX_WAITING="2"
    ) as client:
        ready(client)
        with (
            places_taken(client, MAX_RUNNING),
            closing(sqlite3.connect(file, isolation_level=None)) as other,
        ):
            other.execute("BEGIN IMMEDIATE")
            for _ in range(4):  # more than there are places left
                answer = client.post("/generate", json={"prompt": "Once"})
                assert answer.status_code == 503
                assert answer.json()["code"] == "storage_unavailable"
                assert int(answer.headers["Retry-After"]) > 0
            assert client.get("/history").json() == []
            unready = client.get("/health/ready")
            assert unready.status_code == 503
            assert unready.json()["database"] == "it does not accept writes"
            other.execute("ROLLBACK")
        assert client.get("/history").json() == []
        assert client.post("/generate", json={"prompt": "Once"}).status_code == 200
        assert len(client.get("/history").json()) == 1


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_was_taken_away_is_503_and_not_made_anew(file: Path, replaced: bool) -> None:
    with in_process(DATABASE_URL=f"sqlite:///{file}") as client:
        ready(client)
        assert client.post("/generate", json={"prompt": "Once"}).status_code == 200
        away = file.rename(file.with_name("away.db"))
        if replaced:
            on_file(file).close()
        client.app.state.database.engine.dispose()  # type: ignore[attr-defined]
        assert client.get("/history/1").status_code == 503  # by a new connection
        answer = client.post("/generate", json={"prompt": "Once"})
        assert answer.status_code == 503
        assert client.delete("/history/1").status_code == 503
        assert client.get("/health/ready").status_code == 503
        assert file.exists() is replaced
        if not replaced:
            away.rename(file)
            assert client.post("/generate", json={"prompt": "Once"}).status_code == 200


def test_a_transaction_is_all_or_nothing(database: Database) -> None:
    with database.sessions() as session:
        with contextlib.suppress(ZeroDivisionError), transaction(session):
            leases.add(session, "machine", "process")
            _ = 1 / 0
        assert leases.others(session, 0) == []


def test_the_write_lock_is_given_back_after_a_refusal(file: Path) -> None:
    database = on_file(file, timeout=0.1)
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        for _ in range(3):
            with (
                database.sessions() as session,
                pytest.raises(StorageUnavailableError),
                transaction(session),
            ):
                pass
    with database.sessions() as session:
        assert insert(session) == 1
    database.close()


def is_modelled(name: str | None, kind: str, _: object) -> bool:
    """The search index is the databases' own: another kind of table on each."""
    return kind != "table" or not (name or "").startswith(("record_search", "title_search"))


def test_models_and_migrations_agree(database: Database) -> None:
    with database.engine.connect() as connection:
        options = {"compare_type": True, "include_name": is_modelled}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, Base.metadata) == []


def test_migrations_go_down_and_up_again(
    database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with database.sessions() as session:
        insert(session)
    monkeypatch.setenv("DATABASE_URL", database_url)
    config = Config(ROOT / "alembic.ini")
    command.downgrade(config, "base")
    assert set(inspect(database.engine).get_table_names()) == {"alembic_version"}
    command.upgrade(config, "head")
    command.upgrade(config, "head")
    with database.sessions() as session:
        assert insert(session) == 1


def test_each_migration_goes_down_and_up_with_data_in(
    database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with database.sessions() as session:
        record = insert(session, prompt="Zoë 🐉", completion="x" * 70_000, user_id="anna")
    monkeypatch.setenv("DATABASE_URL", database_url)
    config = Config(ROOT / "alembic.ini")
    revisions = [found.revision for found in ScriptDirectory.from_config(config).walk_revisions()]
    before = first_columns(database, record)
    for lower in revisions[1:]:  # newest first
        command.downgrade(config, lower)
        assert first_columns(database, record) == before
    for higher in reversed(revisions[:-1]):
        command.upgrade(config, higher)
        assert first_columns(database, record) == before
    with database.sessions() as session:
        assert ids(session, user_id="anna") == [record]
    with database.sessions() as session:
        assert insert(session) > record


def first_columns(database: Database, record: int) -> Any:
    """What every version keeps of a record in the same way."""
    names = "id, owner_id, user_id, status, prompt, completion, seed"
    with database.engine.connect() as connection:
        statement = text(f"SELECT {names} FROM generation_records WHERE id = :id")
        return connection.execute(statement, {"id": record}).one()


def test_migrating_again_keeps_the_data(database: Database) -> None:
    with database.sessions() as session:
        record = insert(session, prompt="kept")
    database.migrate()
    with database.sessions() as session:
        assert (
            session.execute(
                text("SELECT prompt FROM generation_records WHERE id = :id"), {"id": record}
            ).scalar()
            == "kept"
        )


MIGRATE = """
import os
from database import Database
database = Database(os.environ["DATABASE_URL"])
database.migrate()
database.close()
"""


@pytest.mark.parametrize("first", [None, "0001"])
def test_processes_that_migrate_at_once_all_succeed(
    database_url: str, first: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = os.environ | {"DATABASE_URL": database_url}
    if first is not None:
        monkeypatch.setenv("DATABASE_URL", database_url)
        command.upgrade(Config(ROOT / "alembic.ini"), first)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MIGRATE], cwd=ROOT, env=environment, stderr=subprocess.PIPE
        )
        for _ in range(3)
    ]
    errors = [process.communicate(timeout=60)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, errors
    database = Database(database_url)
    with database.sessions() as session:
        assert insert(session) == 1
    database.close()


def test_a_newer_database_is_one_clear_line(database: Database) -> None:
    with database.engine.begin() as connection:
        write = connection.execution_options(write=True)
        write.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StartError, match=r"^DATABASE_URL[^\n]*newer version[^\n]*$"):
        database.migrate()


@pytest.mark.parametrize("content", [b"not a database at all " * 100, None])
def test_what_is_no_database_is_one_clear_line(file: Path, content: bytes | None) -> None:
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    with pytest.raises(StartError, match=r"^DATABASE_URL is not usable[^\n]*$"):
        on_file(file)


def test_a_server_that_is_not_there_is_one_clear_line() -> None:
    database = Database("postgresql://nobody@127.0.0.1:1/none")
    with pytest.raises(StartError, match=r"^DATABASE_URL is not usable[^\n]*$"):
        database.migrate()
    database.close()


def test_four_threads_of_writers_lose_nothing(file: Path) -> None:
    databases = [on_file(file) for _ in range(2)]

    def write(number: int) -> int:
        with databases[number % 2].sessions() as session:
            return insert(session)

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(write, range(100)))
    assert sorted(made) == list(range(1, 101))
    for database in databases:
        database.close()


class CutOffError(Exception):
    """What happens to a migration in these tests, in place of a kill."""


@contextlib.contextmanager
def cut_off_before(number: int) -> Iterator[None]:
    """Lets so many statements that change something through, and no more; for any connection."""
    changes = itertools.count()

    def listen(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if statement.split()[0] in CHANGES and next(changes) == number:
            raise CutOffError

    event.listen(Engine, "before_cursor_execute", listen)
    try:
        yield
    finally:
        event.remove(Engine, "before_cursor_execute", listen)


CHANGES = ("ALTER", "CREATE", "DELETE", "DROP", "INSERT", "UPDATE")
OLD_RECORD = """
INSERT INTO generation_records (id, owner_id, status, prompt, completion, model_name,
    model_fingerprint, dtype, parameters, seed, prompt_tokens, completion_tokens, created_at,
    updated_at)
VALUES (7, 'local', 'completed', 'Once', ' upon', 'm', '', '', '{}', 1, 1, 1,
    '2026-01-01 12:00:00', '2026-01-01 12:00:00')
"""


@contextlib.contextmanager
def empty_mysql(folder: Path) -> Iterator[tuple[str, Engine]]:
    """Its URL, and what the test itself asks it through."""
    with fresh_database("mysql", folder) as url:
        engine = create_engine(normalise_url(url))
        try:
            yield url, engine
        finally:
            engine.dispose()


def migrate_cut_off(url: str, number: int) -> bool:
    """Whether it came to its end before so many statements."""
    database = Database(url, unsafe_commits=True)
    try:
        with cut_off_before(number):
            database.migrate()
        return True
    except CutOffError:
        return False
    finally:
        database.close()


def run_by_hand(engine: Engine, statement: str) -> Any:
    with engine.begin() as connection:
        found = connection.execute(text(statement))
        return found.all() if found.returns_rows else []


def version_of(engine: Engine) -> Any:
    if not run_by_hand(engine, "SHOW TABLES LIKE 'alembic_version'"):
        return None
    found = run_by_hand(engine, "SELECT version_num FROM alembic_version")
    return found[0][0] if found else None


def all_that_is_there(engine: Engine) -> dict[str, Any]:
    """Each table as it was made, and its rows, but for what chance gives them."""
    columns = {"secrets": "name", "usage_deltas": "owner_id, created_at, requests"}
    return {
        name: (
            re.sub(
                r"AUTO_INCREMENT=\d+", "", run_by_hand(engine, f"SHOW CREATE TABLE {name}")[0][1]
            ),
            run_by_hand(engine, f"SELECT {columns.get(name, '*')} FROM {name}"),
        )
        for (name,) in run_by_hand(engine, "SHOW TABLES")
    }


def migrate_in_pieces(url: str, engine: Engine) -> int:
    """Cut off after each statement of each migration, and begun again; how often that was."""
    tries, done, version = 0, 0, None
    while not migrate_cut_off(url, done):
        tries, done = tries + 1, done + 1
        if (found := version_of(engine)) != version:
            version, done = found, 0
            if version == "0001":
                run_by_hand(engine, OLD_RECORD)
    return tries


def test_a_migration_cut_off_after_any_step_on_mysql_is_finished_by_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with empty_mysql(tmp_path) as (url, whole):
        monkeypatch.setenv("DATABASE_URL", url)
        command.upgrade(Config(ROOT / "alembic.ini"), "0001")
        run_by_hand(whole, OLD_RECORD)
        command.upgrade(Config(ROOT / "alembic.ini"), "head")
        expected = all_that_is_there(whole)
    with empty_mysql(tmp_path) as (url, cut):
        assert migrate_in_pieces(url, cut) > 50
        assert all_that_is_there(cut) == expected


@pytest.mark.parametrize("name", ["conversations", "leases"])
def test_another_programs_table_on_mysql_stops_every_start(tmp_path: Path, name: str) -> None:
    with empty_mysql(tmp_path) as (url, engine):
        run_by_hand(engine, f"CREATE TABLE {name} (id INTEGER PRIMARY KEY, topic TEXT)")
        for _ in range(2):
            database = Database(url)
            with pytest.raises(StartError, match=r"^DATABASE_URL is not usable[^\n]*$"):
                database.migrate()
            database.close()
        assert version_of(engine) is None
