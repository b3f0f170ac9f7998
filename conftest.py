"""A service in this process on the bundled model, shared by all tests that only talk to it."""

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from tests.service import TINY, ready


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    database = tmp_path_factory.mktemp("service") / "records.db"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("DATABASE_URL", f"sqlite:///{database}")
        environment.setenv("MODEL", TINY)
        from main import app

        with TestClient(app) as client:
            yield ready(client)
