"""How tests run the service: in this process, or as a real server in another one."""

import contextlib
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from copy import copy
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy.orm import Session, sessionmaker
from starlette.datastructures import State

from database import Database

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "weights" / "tiny-gpt2")
START_SECONDS = 240  # a machine that runs much else takes minutes to import PyTorch


def ready(client: TestClient) -> TestClient:
    """The client, once the model is loaded."""
    deadline = time.monotonic() + START_SECONDS
    while client.get("/health/ready").status_code != 200:
        assert time.monotonic() < deadline, client.get("/health/ready").text
        time.sleep(0.05)
    return client


@contextlib.contextmanager
def in_process(**environment: str) -> Iterator[TestClient]:
    """A service of a test's own in this process, whatever other ones run in it."""
    from main import app

    own = copy(app)
    own.state, own.middleware_stack = State(), None
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ({"MODEL": TINY} | environment).items():
            patch.setenv(name, value)
        with TestClient(own) as client:
            yield client
        # Two models that load at once import the same modules, for which they are not made.
        own.state.models.thread.join()


def sessions_of(client: TestClient) -> sessionmaker[Session]:
    """The sessions of the service that a client talks to."""
    database: Database = client.app.state.database  # type: ignore[attr-defined]
    return database.sessions


def free_port() -> int:
    """None of those that the system gives to clients: one could take it before its server does."""
    while True:
        port = random.randint(10_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Server:
    """`uvicorn main:app`, or another ``app``, in its own process; what it prints goes to ``log``.

    With several ``workers`` it must be ended by ``stop``: a killed parent leaves them alone.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        log: Path,
        port: int | None = None,
        workers: int = 1,
        app: str = "main:app",
    ) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        command = [sys.executable, "-m", "uvicorn", app, "--port", str(self.port)]
        command += ["--workers", str(workers)] if workers > 1 else []
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {"MODEL": TINY} | dict(environment),
                stdout=output,
                stderr=output,
            )

    def wait_until_ready(self) -> "Server":
        self.wait_for("/health/ready")
        return self

    def wait_until_alive(self) -> "Server":
        self.wait_for("/health/live")
        return self

    def wait_for(self, path: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(self.url + path, timeout=5).status_code == 200:
                    return
            time.sleep(0.05)
        raise AssertionError(f"{path} was not answered: {self.log.read_text()}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(60)


@contextlib.contextmanager
def serving(log: Path, **environment: str) -> Iterator[Server]:
    """A server that is ready, and gone at the end of the block."""
    server = Server(environment, log)
    try:
        yield server.wait_until_ready()
    finally:
        server.kill()
