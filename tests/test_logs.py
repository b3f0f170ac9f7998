"""Logs tell what happened, in ids and sizes, never in anybody's words."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from tests.service import ROOT, START_SECONDS, TINY, free_port, serving

CANARY = "zebra4711"


def exercise(url: str) -> list[str]:
    """Requests of every kind; the texts that must not be in the log."""
    body = {"prompt": f"The {CANARY} went to the wood", "max_length": 60, "user_id": CANARY}
    with httpx.Client(base_url=url, timeout=60) as client:
        record = client.post("/generate", json=body).json()
        client.post("/generate", json=body | {"prompt": f"I hate {CANARY}"})
        client.post("/generate", json=body | {CANARY: 1})
        client.post("/generate", content=b'{"prompt": "' + CANARY.encode() + b"\xff")
        client.post("/generate/stream", json=body)
        client.get("/history", params={"user_id": CANARY})
        client.get(f"/{CANARY}", params={CANARY: CANARY})
        client.delete(f"/history/{record['id']}", headers={"X-Request-ID": "id-of-the-delete"})
    converse(url.replace("http", "ws"), json.dumps(body))
    completion = record["generated_text"].removeprefix(body["prompt"]).strip()
    return [CANARY, completion[:30], completion[-30:]]


def converse(url: str, message: str) -> None:
    """A WebSocket with a query, and one at an address that is none."""
    with connect(f"{url}/ws/generate?prompt={CANARY}") as socket:
        socket.send(message)
        while json.loads(socket.recv())["event"] != "done":
            pass
        socket.send(f"{CANARY} is no request")
        socket.recv()
    with pytest.raises(InvalidStatus):
        connect(f"{url}/ws/elsewhere?prompt={CANARY}")


def log_of(folder: Path, log_format: str) -> tuple[str, list[str]]:
    """What a server prints at its most talkative, and what must not be in it."""
    environment = {"LOG_FORMAT": log_format, "LOG_LEVEL": "DEBUG"}
    url = f"sqlite:///{folder / 'records.db'}"
    with serving(folder / "log", DATABASE_URL=url, **environment) as server:
        texts = exercise(server.url)
        server.stop()
    return (folder / "log").read_text(), [text for text in texts if len(text) > 5]


@contextlib.contextmanager
def traced(folder: Path) -> Iterator[str]:
    """The address of `uvicorn main:app --log-level trace`, as one runs it to look for a fault."""
    port = str(free_port())
    database = {"DATABASE_URL": f"sqlite:///{folder / 'records.db'}", "MODEL": TINY}
    command = [sys.executable, "-m", "uvicorn", "main:app", "--port", port, "--log-level", "trace"]
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(
            command, cwd=ROOT, env=os.environ | database, stdout=log, stderr=log
        ) as process,
    ):
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
                wait_until_ready(client)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def wait_until_ready(client: httpx.Client) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if client.get("/health/ready").status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError("it does not start")


def test_lines_to_read_hold_neither_prompts_nor_outputs(tmp_path: Path) -> None:
    log, texts = log_of(tmp_path, "console")
    assert "record accepted" in log
    assert [text for text in texts if text in log] == []


def test_a_server_told_to_trace_keeps_them_out_too(tmp_path: Path) -> None:
    with traced(tmp_path) as url:
        texts = [text for text in exercise(url) if len(text) > 5]
    log = (tmp_path / "log").read_text()
    assert "record accepted" in log
    assert [text for text in texts if text in log] == []


def test_json_lines_are_objects_with_ids_and_hold_neither_prompts_nor_outputs(
    tmp_path: Path,
) -> None:
    log, texts = log_of(tmp_path, "json")
    assert [text for text in texts if text in log] == []
    lines = log.splitlines()
    events = [json.loads(line) for line in lines if line.startswith("{")]
    named = {event["event"]: event for event in events}
    assert all({"time", "level", "logger", "event"} <= set(event) for event in events)
    assert named["model ready"]["model"] == "tiny-gpt2"
    assert named["record accepted"]["id"] >= 1
    assert named["record finished"]["ms"] >= 0
    assert named["prompt refused"]["characters"] == len(f"I hate {CANARY}")
    assert named["record deleted"]["request_id"] == "id-of-the-delete"
    assert named["drained"]
    assert [line for line in lines if not line.startswith("{") and "INFO" not in line] == []
