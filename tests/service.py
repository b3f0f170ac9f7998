"""How tests run the service: in this process, or as a real server in another one."""

import contextlib
import multiprocessing
import os
import random
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from copy import copy
from multiprocessing.context import ForkServerProcess, SpawnProcess
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi.testclient import TestClient
from sqlalchemy.orm import Session, sessionmaker
from starlette.datastructures import State

from database import Database
from engine.sampling import SamplingParams

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "weights" / "tiny-gpt2")
START_SECONDS = 240  # a machine that runs much else takes minutes to import PyTorch

# What a server imports takes it up to ten seconds: one process does it, and servers are its forks.
multiprocessing.set_forkserver_preload(["main", "engine.engine", "engine.loading"])


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


@contextlib.contextmanager
def places_taken(client: TestClient, count: int) -> Iterator[None]:
    """So many places for generations are held by some that do not start."""
    engine = client.app.state.models.engine  # type: ignore[attr-defined]
    held = [engine.admit([1], SamplingParams(1, seed=0)) for _ in range(count)]
    yield
    for generation in held:
        generation.cancel()


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


def run_app(app: str, port: int, workers: int, environment: dict[str, str], log: Path) -> None:
    """`uvicorn app`, in a process of its own."""
    with log.open("ab") as output, open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.stdin = os.fdopen(0)  # which workers open again by its number
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    uvicorn.run(app, port=port, workers=workers)


class Server:
    """`uvicorn main:app`, or another ``app``, in its own process; what it prints goes to ``log``.

    With several ``workers`` it must be ended by ``stop``: a killed parent leaves them alone. One
    whose ``environment`` tells a library something that it reads when imported is ``imported``
    anew.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        log: Path,
        port: int | None = None,
        workers: int = 1,
        app: str = "main:app",
        imported: bool = False,
    ) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        process = SpawnProcess if imported else ForkServerProcess
        self.process = process(
            target=run_app,
            args=(app, self.port, workers, os.environ | {"MODEL": TINY} | dict(environment), log),
            daemon=workers == 1,
        )
        self.process.start()

    def wait_until_ready(self) -> "Server":
        self.wait_for("/health/ready")
        return self

    def wait_until_alive(self) -> "Server":
        self.wait_for("/health/live")
        return self

    def wait_for(self, path: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.is_alive(), self.log.read_text()
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(self.url + path, timeout=5).status_code == 200:
                    return
            time.sleep(0.05)
        raise AssertionError(f"{path} was not answered: {self.log.read_text()}")

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def stop(self) -> int:
        self.process.terminate()
        self.process.join(60)
        assert self.process.exitcode is not None, "it did not stop"
        return self.process.exitcode


@contextlib.contextmanager
def serving(log: Path, **environment: str) -> Iterator[Server]:
    """A server that is ready, and gone at the end of the block."""
    server = Server(environment, log)
    try:
        yield server.wait_until_ready()
    finally:
        server.kill()
