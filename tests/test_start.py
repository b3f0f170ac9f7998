"""Starting: the port opens at once, the model comes when it comes, and a refusal is one line."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from uvicorn.config import STARTUP_FAILURE

from tests.service import ROOT, START_SECONDS, TINY, Server, free_port, in_process
from tests.test_history import insert

NOTHING_STARTS = """
import os, sys, threading
import main
assert threading.active_count() == 1, threading.enumerate()
assert not {"torch", "transformers"} & set(sys.modules), "a model library was imported"
assert os.listdir(".") == [], os.listdir(".")
"""


def test_importing_main_starts_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NOTHING_STARTS],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MODEL": TINY},
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
    )
    assert done.returncode == 0, done.stderr


UVICORN = ("-m", "uvicorn", "main:app")


def start_refused(
    tmp_path: Path, status: int, command: tuple[str, ...] = UVICORN, **environment: str
) -> list[str]:
    """The lines that name the cause, of a server that did not start or did not go on."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ
        | {"DATABASE_URL": f"sqlite:///{tmp_path / 'records.db'}", "MODEL": TINY}
        | dict.fromkeys(("PORT", "UVICORN_PORT"), str(free_port()))
        | environment,
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
    )
    assert done.returncode == status
    assert "Traceback" not in done.stderr
    return [line for line in done.stderr.splitlines() if "INFO" not in line and line.strip()]


def test_a_wrong_setting_stops_the_start_with_one_line(tmp_path: Path) -> None:
    lines = start_refused(tmp_path, STARTUP_FAILURE, DTYPE="float8")
    assert len([line for line in lines if "DTYPE is not usable" in line]) == 1
    assert len(lines) <= 2  # the server adds that it exits


def test_a_database_that_cannot_be_opened_stops_the_start_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    lines = start_refused(
        tmp_path, STARTUP_FAILURE, DATABASE_URL=f"sqlite:///{tmp_path}/file/records.db"
    )
    assert len([line for line in lines if "DATABASE_URL is not usable" in line]) == 1
    assert len(lines) <= 2


@pytest.mark.parametrize("model", ["./no-such-folder", "{tmp_path}"])
def test_a_named_model_that_is_not_there_stops_the_server(tmp_path: Path, model: str) -> None:
    model = model.format(tmp_path=tmp_path)
    lines = start_refused(tmp_path, 1, MODEL=model)
    assert len([line for line in lines if f"MODEL={model}" in line]) == 1
    assert len(lines) == 1


def test_a_broken_model_stops_the_server_with_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "config.json").write_text("{")
    (folder / "model.safetensors").write_bytes(b"nothing")
    lines = start_refused(tmp_path, 1, ("main.py",), MODEL=str(folder))
    assert len([line for line in lines if "MODEL=broken did not load" in line]) == 1
    assert len(lines) == 1


def test_a_row_that_names_the_model_before_it_is_loaded_holds_no_path(tmp_path: Path) -> None:
    with in_process(DATABASE_URL=f"sqlite:///{tmp_path / 'records.db'}", MODEL=TINY) as client:
        made = client.post("/conversations", json={"title": "x"})  # before it can be loaded
        assert made.json()["model_type"] == Path(TINY).name


@pytest.fixture
def silent_hub() -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken: list[socket.socket] = []

        def take() -> None:
            while True:
                try:
                    taken.append(listener.accept()[0])
                except OSError:
                    return

        threading.Thread(target=take, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        for connection in taken:
            connection.close()


def test_a_hub_that_never_answers_holds_nothing_up(tmp_path: Path, silent_hub: str) -> None:
    from database import Database

    url = f"sqlite:///{tmp_path / 'records.db'}"
    database = Database(url)
    database.migrate()
    with database.sessions() as session:
        insert(session)
    database.close()
    environment = {
        "DATABASE_URL": url,
        "MODEL": "",
        "HF_ENDPOINT": silent_hub,
        "HF_HOME": str(tmp_path / "hub"),
        "no_proxy": "*",
    }
    server = Server(environment, tmp_path / "log", imported=True)
    try:
        server.wait_until_alive()
        unready = httpx.get(f"{server.url}/health/ready", timeout=60)
        assert unready.status_code == 503
        assert int(unready.headers["Retry-After"]) > 0
        assert unready.json()["model"] == "it is still loading"
        refused = httpx.post(f"{server.url}/generate", json={"prompt": "Once"}, timeout=60)
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) > 0
        assert "still loading" in refused.json()["detail"]
        stored = httpx.get(f"{server.url}/history/1", timeout=60).json()
        assert stored["generated_text"] == "Once upon a time"
        began = time.monotonic()
        server.wait_until_ready()
        assert time.monotonic() - began < 120  # to load a model takes half of that at worst
        ready = httpx.get(f"{server.url}/health/ready", timeout=60).json()
        assert ready["model_name"] == "tiny-gpt2"
        assert "bundled" in ready["warning"]
        answer = httpx.post(f"{server.url}/generate", json={"prompt": "Once"}, timeout=60)
        assert answer.json()["model_name"] == "tiny-gpt2"
        assert "WARNING" in server.log.read_text()
        assert "bundled model tiny-gpt2 instead" in server.log.read_text()
    finally:
        server.kill()
