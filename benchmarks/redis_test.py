"""A Redis that dies and lies under load costs time alone.

    python -m benchmarks.redis_test --times 10

16 clients ask for each work five times with `use_cache`, twice of it at once, while everything in
their Redis is overwritten: with garbage, with values of another kind, with the ids of other
records; and while it is killed and started again, empty. Whatever it says, each work is done once,
every answer shows that work's text, and every record that was answered is there. Each count that
is named after a promise must be 0, and the exit status says so. Servers are this command's own.
"""

import argparse
import asyncio
import itertools
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from sqlalchemy import Row

from benchmarks.faults import rows_of
from benchmarks.promises import report
from services.cache import PREFIX, REDIS_REST_SECONDS
from tests.database_servers import Redis
from tests.service import serving

CLIENTS = 16
ROUND_SECONDS = 1.0
PATIENCE_SECONDS = 60.0


class Answered(NamedTuple):
    prompt: str
    status: int
    body: dict[str, Any]


class Load:
    """Asks for each work five times until told to stop, and keeps what was answered."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.numbers = itertools.count()
        self.answers: list[Answered] = []

    async def client(self, stop: threading.Event) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=120) as client:
            while not stop.is_set():
                prompt = f"King {next(self.numbers)} said"
                await asyncio.gather(self.ask(client, prompt), self.ask(client, prompt))
                for _ in range(3):
                    await self.ask(client, prompt)

    async def ask(self, client: httpx.AsyncClient, prompt: str) -> None:
        body = {"prompt": prompt, "max_length": 30, "use_cache": True}
        answer = await client.post("/generate", json=body)
        self.answers.append(Answered(prompt, answer.status_code, answer.json()))

    async def during(self, fault: Callable[[], None]) -> None:
        stop = threading.Event()
        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(self.client(stop))
            try:
                await asyncio.to_thread(fault)
            finally:
                stop.set()


def kill(server: Redis) -> None:
    server.stop()
    time.sleep(ROUND_SECONDS)
    server.start()


def lie(server: Redis, rng: random.Random) -> int:
    """Overwrite all that is there, again and again; how often."""
    lies, began = 0, time.monotonic()
    while (passed := time.monotonic() - began) < ROUND_SECONDS or not lies:
        if passed > PATIENCE_SECONDS:
            raise TimeoutError("nothing came into Redis")
        for key in server.client.scan_iter(PREFIX + "*"):
            if rng.random() < 0.2:
                server.client.delete(key)
                server.client.lpush(key, "a list")
            else:
                server.client.set(key, rng.choice([b"garbage", b"\xff", b"-1", b"9" * 30, b"1"]))
            lies += 1
    return lies


def judge(rows: list[Row[Any]], answers: list[Answered]) -> Counter[str]:
    own = {row.prompt: row for row in rows if row.source_id is None}
    ids = {row.id for row in rows}
    counts: Counter[str] = Counter(answers=len(answers), rows=len(rows), works=len(own))
    counts["P2 not completed"] = sum(row.status != "completed" for row in rows)
    counts["P3 doubled"] = sum(row.source_id is None for row in rows) - len(own)
    answered = [answer for answer in answers if answer.status == 200]
    counts["P7 answers other than 200"] = len(answers) - len(answered)
    counts["P2 phantom"] = len(ids - {answer.body["id"] for answer in answered})
    for prompt, _, body in answered:
        counts["cached"] += body["cached"]
        counts["P1 lost"] += body["id"] not in ids
        row = own.get(prompt)
        whole = None if row is None else row.prompt + row.completion
        counts["P1 other text"] += body["generated_text"] != whole
    return counts


def torture(times: int, folder: Path, seed: int = 1) -> Counter[str]:
    rng, lies = random.Random(seed), 0
    redis = Redis()

    def fault() -> None:
        nonlocal lies
        for number in range(times):
            time.sleep(REDIS_REST_SECONDS if number else ROUND_SECONDS)
            lies += lie(redis, rng)
            kill(redis)

    url = f"sqlite:///{folder / 'records.db'}"
    settings = {"DATABASE_URL": url, "REDIS_URL": redis.url, "LOG_LEVEL": "WARNING"}
    try:
        with serving(folder / "log", **settings) as server:
            load = Load(server.url)
            asyncio.run(load.during(fault))
    finally:
        redis.stop()
    return judge(rows_of(url), load.answers) + Counter(kills=times, lies=lies)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--times", type=int, default=10)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = torture(args.times, Path(folder))
    return report(counts)


if __name__ == "__main__":
    sys.exit(main())
