"""A fresh database for each test, on SQLite and, where their variables are set, on servers."""

import contextlib
import functools
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from sqlalchemy import URL, Engine, create_engine, text

from connections import normalise_url
from database import Database

VARIABLES = {"postgresql": "TEST_POSTGRES_URL", "mysql": "TEST_MYSQL_URL"}
KINDS = ["sqlite", *VARIABLES]


def server_url(kind: str) -> URL:
    """The server that tests may make databases on; skips where none is named."""
    if not (given := os.environ.get(VARIABLES[kind])):
        missing(f"{VARIABLES[kind]} is not set")
    return normalise_url(given)


def missing(reason: str) -> NoReturn:
    """Skip a test for want of a server; fail it where NO_SKIPS says that servers must be there."""
    if os.environ.get("NO_SKIPS"):
        pytest.fail(reason)
    pytest.skip(reason)


@contextlib.contextmanager
def fresh_database(kind: str, folder: Path) -> Iterator[str]:
    """The URL of an empty database, gone at the end of the block."""
    if kind == "sqlite":
        yield f"sqlite:///{folder / 'records.db'}"
        return
    url = server_url(kind)
    name = f"test_{uuid.uuid4().hex[:12]}"
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    execute(engine, f"CREATE DATABASE {name}")
    try:
        yield url.set(database=name).render_as_string(hide_password=False)
    finally:
        force = " WITH (FORCE)" if kind == "postgresql" else ""
        execute(engine, f"DROP DATABASE {name}{force}")
        engine.dispose()


@contextlib.contextmanager
def prepared_database(kind: str, folder: Path) -> Iterator[str]:
    """A fresh database to be migrated; where that takes seconds, on MySQL, it is done already."""
    with fresh_database(kind, folder) as url:
        if kind == "mysql":
            copy_schema(url)
        yield url


def copy_schema(url: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("SET foreign_key_checks = 0"))
        for statement, values in mysql_schema():
            connection.exec_driver_sql(statement, values)
    engine.dispose()


@functools.cache
def mysql_schema() -> list[tuple[str, tuple[Any, ...]]]:
    """What makes each table, and the rows that a migrated database begins with."""
    with fresh_database("mysql", Path()) as url:
        database = Database(url)
        database.migrate()
        with database.engine.connect() as connection:
            tables = connection.scalars(text("SHOW TABLES")).all()
            made = [connection.execute(text(f"SHOW CREATE TABLE {name}")).one() for name in tables]
            rows = [
                (f"INSERT INTO {name} VALUES ({', '.join(['%s'] * len(row))})", tuple(row))
                for name in tables
                for row in connection.execute(text(f"SELECT * FROM {name}"))
            ]
        database.close()
    return [(statement, ()) for _, statement in made] + rows


def execute(engine: Engine, sql: str) -> None:
    with engine.connect() as connection:
        connection.execute(text(sql))
