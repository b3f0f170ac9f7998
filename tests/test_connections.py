"""Connections: the waits are bounded, alike on every server, and an unsafe server is refused."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from connections import STATEMENT_FACTOR, normalise_url
from database import Database, transaction
from errors import StartError, StorageUnavailableError
from models import GenerationRecord
from repositories import records, removal
from tests.database_servers import MariaDb, Postgres, running
from tests.databases import fresh_database
from tests.test_history import insert

TIMEOUT = 0.4  # MySQL counts whole seconds
SLEEP = {"postgresql": "SELECT pg_sleep(60)", "mysql": "SELECT SLEEP(60)"}


@pytest.fixture(params=["postgresql", "mysql"])
def impatient(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    with fresh_database(request.param, tmp_path) as url:
        database = Database(url, TIMEOUT, pool_size=2)
        database.migrate()
        yield database
        database.close()


def rename(session: Session, record: int) -> None:
    session.get_one(GenerationRecord, record).model_name = "other"
    session.flush()


def test_a_row_that_another_holds_is_503_in_time(impatient: Database) -> None:
    with impatient.sessions() as holder, impatient.sessions() as waiter:
        record = insert(holder)
        with transaction(holder):
            rename(holder, record)
            began = time.monotonic()
            with pytest.raises(StorageUnavailableError), transaction(waiter):
                removal.remove(waiter, "local", record)
            assert TIMEOUT * 0.9 < time.monotonic() - began < TIMEOUT + 10
        with transaction(waiter):
            assert removal.remove(waiter, "local", record)


def test_a_statement_is_ended_in_time(impatient: Database) -> None:
    began = time.monotonic()
    with impatient.engine.connect() as connection, pytest.raises(OperationalError):
        connection.execute(text(SLEEP[impatient.engine.dialect.name.replace("mariadb", "mysql")]))
    assert time.monotonic() - began < TIMEOUT * STATEMENT_FACTOR + 10


def test_a_pool_that_is_used_up_is_503_in_time(impatient: Database) -> None:
    held = [impatient.engine.connect() for _ in range(2)]
    began = time.monotonic()
    with (
        impatient.sessions() as session,
        pytest.raises(StorageUnavailableError),
        transaction(session),
    ):
        pass
    assert time.monotonic() - began < TIMEOUT + 10
    for connection in held:
        connection.close()


def test_a_connection_that_the_server_closed_is_replaced(impatient: Database) -> None:
    with impatient.sessions() as session:
        insert(session)
    postgresql = impatient.engine.dialect.name == "postgresql"
    with impatient.engine.connect() as killer:
        with impatient.engine.connect() as victim:
            who = "pg_backend_pid()" if postgresql else "CONNECTION_ID()"
            number = victim.scalar(text(f"SELECT {who}"))
        killer.execute(
            text("SELECT pg_terminate_backend(:id)" if postgresql else "KILL :id"), {"id": number}
        )
    with impatient.sessions() as one, impatient.sessions() as two:
        insert(one)
        insert(two)


def test_a_postgresql_that_says_nothing_any_more_is_given_up_in_time() -> None:
    with running(Postgres(), last="immediate") as server:
        database = Database(server.url, TIMEOUT, pool_size=2)
        with database.engine.connect() as connection:
            backend = connection.scalar(text("SELECT pg_backend_pid()"))
            os.kill(backend, signal.SIGSTOP)
            try:
                began = time.monotonic()
                with pytest.raises(OperationalError):
                    connection.execute(text("SELECT 1"))
                assert time.monotonic() - began < TIMEOUT * (STATEMENT_FACTOR + 1) + 5
            finally:
                os.kill(backend, signal.SIGCONT)
        with database.engine.connect() as connection:  # a new one
            assert connection.scalar(text("SELECT pg_backend_pid()")) != backend
        database.close()


def test_what_is_not_committed_is_not_seen(database: Database) -> None:
    with database.sessions() as writer, database.sessions() as reader:
        record = insert(writer)
        with transaction(writer):
            rename(writer, record)
            found = reader.get_one(GenerationRecord, record)
            assert found.model_name == "tiny-gpt2"
            reader.rollback()
        reader.expire_all()
        assert reader.get_one(GenerationRecord, record).model_name == "other"


def test_servers_agree_on_what_a_transaction_sees(impatient: Database) -> None:
    with impatient.sessions() as writer, impatient.sessions() as reader:
        record = insert(writer)
        with transaction(reader):
            assert reader.get_one(GenerationRecord, record).model_name == "tiny-gpt2"
            with transaction(writer):
                rename(writer, record)
            reader.expire_all()
            assert reader.get_one(GenerationRecord, record).model_name == "other"


def test_postgresql_compiles_no_queries(tmp_path: Path) -> None:
    with fresh_database("postgresql", tmp_path) as url:
        database = Database(url)
        with database.engine.connect() as connection:
            assert connection.scalar(text("SHOW jit")) == "off"
        database.close()


def test_a_postgresql_that_loses_commits_stops_the_start(tmp_path: Path) -> None:
    with fresh_database("postgresql", tmp_path) as url:
        off = f"{url}?options=-csynchronous_commit%3Doff"
        stops_the_start_unless_told(off, "synchronous_commit is off")


def test_a_mysql_that_loses_commits_stops_the_start(tmp_path: Path) -> None:
    with running(MariaDb(tmp_path), last="kill") as server:
        engine = create_engine(normalise_url(server.url))
        with engine.connect() as connection:
            connection.execute(text("SET GLOBAL innodb_flush_log_at_trx_commit = 2"))
        engine.dispose()
        stops_the_start_unless_told(server.url, "innodb_flush_log_at_trx_commit is 2")


def stops_the_start_unless_told(url: str, reason: str) -> None:
    database = Database(url)
    with pytest.raises(StartError, match=rf"^DATABASE_URL[^\n]*{reason}[^\n]*$"):
        database.migrate()
    database.close()
    told = Database(url, unsafe_commits=True)
    told.migrate()
    told.close()


# SQLite keeps texts of any length; the schemas bound them.
@pytest.mark.parametrize("database_url", ["postgresql", "mysql"], indirect=True)
def test_a_text_that_is_too_long_is_refused_not_cut(database: Database) -> None:
    with (
        database.sessions() as session,
        pytest.raises(StorageUnavailableError),
        transaction(session),
    ):
        records.add(session, "x" * 65)


def test_a_server_without_strict_mode_does_not_cut_texts(tmp_path: Path) -> None:
    with fresh_database("mysql", tmp_path) as url:
        lax = make_url(url).update_query_dict({"init_command": "SET sql_mode = ''"})
        database = Database(lax.render_as_string(hide_password=False))
        database.migrate()
        with database.engine.connect() as connection:
            assert "STRICT_ALL_TABLES" in str(connection.scalar(text("SELECT @@sql_mode")))
        database.close()


def test_writers_wait_as_long_as_their_queue_moves(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'records.db'}", timeout=1)
    database.migrate()
    refused: list[StorageUnavailableError] = []

    def write() -> None:
        try:
            with database.sessions() as session, transaction(session):
                time.sleep(0.2)
        except StorageUnavailableError as error:
            refused.append(error)

    writers = [threading.Thread(target=write) for _ in range(10)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert refused == []
    database.close()
