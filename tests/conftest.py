"""Databases for store tests: fresh and migrated for each test, on every kind that is at hand."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlalchemy.orm import Session

from database import Database
from tests.databases import KINDS
from tests.prepared import close_spare, prepared_database
from tests.service import Server, in_process, ready, serving


def pytest_sessionfinish() -> None:
    close_spare()


@pytest.fixture(params=KINDS)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with prepared_database(request.param, tmp_path) as url:
        yield url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = Database(database_url)
    opened.open()
    yield opened
    opened.close()


@pytest.fixture
def session(database: Database) -> Iterator[Session]:
    with database.sessions() as opened:
        yield opened


@pytest.fixture(scope="module", params=KINDS)
def service(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TestClient]:
    """A service of a module's own in this process, on every kind of database."""
    folder = tmp_path_factory.mktemp("service")
    with prepared_database(request.param, folder) as url, in_process(DATABASE_URL=url) as client:
        yield ready(client)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real server, for what only the network shows."""
    folder = tmp_path_factory.mktemp("server")
    with serving(folder / "log", DATABASE_URL=f"sqlite:///{folder / 'records.db'}") as server:
        yield server
