"""A fresh database for each test, on SQLite and, where their variables are set, on servers."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from sqlalchemy import URL, Engine, create_engine, text

from connections import normalise_url

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


def execute(engine: Engine, sql: str) -> None:
    with engine.connect() as connection:
        connection.execute(text(sql))
