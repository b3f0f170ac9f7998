"""Logs tell what happened, in ids and sizes, never in anybody's words."""

import json
from pathlib import Path

import httpx

from tests.service import Server, serving

CANARY = "zebra4711"


def exercise(server: Server) -> list[str]:
    """Requests of every kind; the texts that must not be in the log."""
    body = {"prompt": f"The {CANARY} went to the wood", "max_length": 60, "user_id": CANARY}
    with httpx.Client(base_url=server.url, timeout=60) as client:
        record = client.post("/generate", json=body).json()
        client.post("/generate", json=body | {"prompt": f"I hate {CANARY}"})
        client.post("/generate", json=body | {CANARY: 1})
        client.post("/generate", content=b'{"prompt": "' + CANARY.encode() + b"\xff")
        client.post("/generate/stream", json=body)
        client.get("/history", params={"user_id": CANARY})
        client.get(f"/{CANARY}", params={CANARY: CANARY})
        client.delete(f"/history/{record['id']}", headers={"X-Request-ID": "id-of-the-delete"})
    completion = record["generated_text"].removeprefix(body["prompt"]).strip()
    return [CANARY, completion[:30], completion[-30:]]


def log_of(folder: Path, log_format: str) -> tuple[str, list[str]]:
    """What a server prints at its most talkative, and what must not be in it."""
    environment = {"LOG_FORMAT": log_format, "LOG_LEVEL": "DEBUG"}
    url = f"sqlite:///{folder / 'records.db'}"
    with serving(folder / "log", DATABASE_URL=url, **environment) as server:
        texts = exercise(server)
        server.stop()
    return (folder / "log").read_text(), [text for text in texts if len(text) > 5]


def test_lines_to_read_hold_neither_prompts_nor_outputs(tmp_path: Path) -> None:
    log, texts = log_of(tmp_path, "console")
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
