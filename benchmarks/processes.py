"""Several processes on one database: every write comes through, and no living one is judged dead.

    python -m benchmarks.processes                    four workers on one SQLite file
    python -m benchmarks.processes --kind postgresql  two services on one PostgreSQL
    python -m benchmarks.processes --kind mysql       the same on MariaDB or MySQL

64 clients make 10,000 writing requests: generations (two writes each), conversations, exchanges
that are stored, changes and deletions. Afterwards every row is compared with what was answered.
Counts of broken promises must be 0, and the exit status says so. Servers' databases are made on
TEST_POSTGRES_URL and TEST_MYSQL_URL.
"""

import argparse
import asyncio
import contextlib
import itertools
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import create_engine, text

from benchmarks.promises import report
from connections import normalise_url
from tests.databases import KINDS, fresh_database
from tests.service import Server

READY_ANSWERS = 60  # in a row, each by a worker that the kernel picks: then all are ready
WRONG_IN_LOGS = ("database is locked", "QueuePool", "Traceback", "storage_unavailable")


class Clients:
    """What clients did and were answered: the text of each id, None where it was deleted."""

    def __init__(self, urls: list[str], seed: int) -> None:
        self.urls = urls
        self.rng = random.Random(seed)
        self.texts: dict[int, str | None] = {}
        self.broken: Counter[str] = Counter()

    async def run(self, clients: int, writes: int) -> None:
        self.left = writes
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(self.one(self.urls[number % len(self.urls)]))

    async def one(self, url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            for act in itertools.cycle((self.generate, self.converse)):
                if self.left <= 0:
                    return
                await act(client)

    async def send(self, client: httpx.AsyncClient, method: str, path: str, **body: Any) -> Any:
        self.left -= 1
        try:
            answer = await client.request(method, path, json=body or None)
        except httpx.HTTPError as error:
            self.broken[f"P7 error: {type(error).__name__}"] += 1
            return None
        if answer.status_code >= 300:
            self.broken[f"P7 error: {answer.status_code} {path.strip('/0123456789')}"] += 1
            return None
        return answer.json() if answer.content else {}

    async def generate(self, client: httpx.AsyncClient) -> None:
        prompt = f"King {self.rng.randrange(10**6)}"
        record = await self.send(client, "POST", "/generate", prompt=prompt, max_length=14)
        if record is not None:
            self.keep(record["id"], record["generated_text"])
            if self.rng.random() < 0.1:
                await self.send(client, "DELETE", f"/history/{record['id']}")
                self.texts[record["id"]] = None

    async def converse(self, client: httpx.AsyncClient) -> None:
        thread = await self.send(client, "POST", "/conversations", title="Four")
        if thread is None:
            return
        path = f"/conversations/{thread['id']}"
        said = {"prompt_content": "Who is there?", "response_content": "A fox."}
        message = await self.send(client, "POST", f"{path}/messages", **said)
        if message is not None:
            self.keep(message["id"], "Who is there?A fox.")
        await self.send(client, "PUT", path, title="Five")

    def keep(self, record: int, text: str) -> None:
        self.broken["P1 id answered twice"] += record in self.texts
        self.texts[record] = text


def compare(url: str, texts: dict[int, str | None]) -> Counter[str]:
    """What the database has, against what was answered."""
    engine = create_engine(normalise_url(url))
    statement = "SELECT id, prompt, completion, status, finish_reason FROM generation_records"
    with engine.connect() as connection:
        rows = {row.id: row for row in connection.execute(text(statement))}
    engine.dispose()
    kept = {record: text for record, text in texts.items() if text is not None}
    counts: Counter[str] = Counter(answered=len(texts), rows=len(rows))
    counts["P1 lost"] = len(kept.keys() - rows.keys())
    counts["P2 phantom"] = len(rows.keys() - kept.keys())
    for record in kept.keys() & rows.keys():
        row = rows[record]
        counts["P1 other text"] += row.prompt + row.completion != kept[record]
        counts["P2 interrupted"] += row.finish_reason == "interrupted"
        counts["P2 not completed"] += row.status != "completed"
    return counts


def is_ready(server: Server) -> bool:
    return httpx.get(f"{server.url}/health/ready", timeout=60).status_code == 200


def wait_until_all_ready(server: Server) -> None:
    server.wait_until_ready()
    answers, deadline = 0, time.monotonic() + 120
    while answers < READY_ANSWERS:
        answers = answers + 1 if is_ready(server) else 0
        if time.monotonic() > deadline:
            raise TimeoutError("not every worker became ready")


@contextlib.contextmanager
def services(count: int, workers: int, folder: Path, url: str) -> Iterator[list[Server]]:
    environment = {"DATABASE_URL": url, "LOG_LEVEL": "WARNING"}
    servers = [
        Server(environment, folder / f"log{number}", workers=workers) for number in range(count)
    ]
    try:
        for server in servers:
            wait_until_all_ready(server)
        yield servers
    finally:
        for server in servers:
            server.stop()


def run(
    kind: str, folder: Path, clients: int, writes: int, services_: int, workers: int, seed: int = 1
) -> Counter[str]:
    with fresh_database(kind, folder) as url:
        with services(services_, workers, folder, url) as servers:
            load = Clients([server.url for server in servers], seed)
            began = time.monotonic()
            asyncio.run(load.run(clients, writes))
            seconds = time.monotonic() - began
            counts = load.broken + compare(url, load.texts)
        counts["requests"], counts["a second"] = writes - load.left, round(writes / seconds)
        for server in servers:
            logged = server.log.read_text()
            for words in WRONG_IN_LOGS:
                counts[f"P7 logged: {words}"] += logged.count(words)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kind", choices=KINDS, default="sqlite")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--writes", type=int, default=10_000)
    args = parser.parse_args()
    count, workers = (1, 4) if args.kind == "sqlite" else (2, 1)
    with tempfile.TemporaryDirectory() as folder:
        counts = run(args.kind, Path(folder), args.clients, args.writes, count, workers)
    return report(counts)


if __name__ == "__main__":
    sys.exit(main())
