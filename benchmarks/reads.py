"""Reads against three baselines, in one run: requests a second, and how long the slowest take.

    python -m benchmarks.reads                  on SQLite, and on TEST_POSTGRES_URL if it is set
    python -m benchmarks.reads --seconds 5

`GET /history/{id}` and `GET /conversations/{id}` of this service, of the book chapter's way on
PostgreSQL, of the first guide's way on SQLite, and a route that returns a constant
(`read_baselines.py`). All servers are up at once and take turns, round by round, so that a noisy
machine disturbs them alike; figures are medians of the rounds. Then the service is read while 16
generations run. The client is raw sockets on one event loop: it must not be what is measured.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from database import Database, transaction
from models import Status
from repositories import conversations, records
from tests.databases import fresh_database
from tests.service import Server

ROWS = 1000
CLIENTS = (1, 16, 64)
GENERATIONS = 16
PATHS = ("/history/{}", "/conversations/{}")


@dataclass
class Round:
    """Requests a second, and seconds that single ones took."""

    rate: float
    seconds: list[float]

    def quantile(self, part: float) -> float:
        return sorted(self.seconds)[min(len(self.seconds) - 1, int(part * len(self.seconds)))]


async def one_client(url: str, path: str, deadline: float, seconds: list[float]) -> None:
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    while (began := time.perf_counter()) < deadline:
        target = path.format(random.randrange(1, ROWS + 1))
        writer.write(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        await read_answer(reader, target)
        seconds.append(time.perf_counter() - began)
    writer.close()


async def read_answer(reader: asyncio.StreamReader, target: str) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"{target}: {head!r}")
    length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
    return await reader.readexactly(int(length))


async def read(url: str, path: str, clients: int, length: float) -> Round:
    seconds: list[float] = []
    began = time.perf_counter()
    readers = [one_client(url, path, began + length, seconds) for _ in range(clients)]
    await asyncio.gather(*readers)
    return Round(len(seconds) / (time.perf_counter() - began), seconds)


async def generate_until_stopped(url: str, stopping: asyncio.Event) -> None:
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    body = json.dumps({"prompt": "Once upon a time", "max_length": 200}).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    while not stopping.is_set():
        writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        await read_answer(reader, "/generate")
    writer.close()


def fill(url: str) -> None:
    database = Database(url)
    database.migrate()
    now = datetime.now(UTC)
    with database.sessions() as session, transaction(session):
        for number in range(ROWS):
            conversations.add(
                session,
                "local",
                title=f"Conversation {number}",
                model_type="tiny-gpt2",
                created_at=now,
                updated_at=now,
            )
            records.add(
                session,
                "local",
                status=Status.COMPLETED,
                prompt="Once upon a time",
                completion=", he had found himself amongst the trees" * 4,
                model_name="tiny-gpt2",
                model_fingerprint="0" * 16,
                dtype="float32",
                parameters={},
                seed=number,
                prompt_tokens=4,
                completion_tokens=46,
                created_at=now,
                updated_at=now,
            )
    database.close()


@contextlib.contextmanager
def servers(folder: Path) -> Iterator[dict[str, str]]:
    """The URL of each way to answer, by name."""
    with contextlib.ExitStack() as stack:
        urls: dict[str, str] = {}
        kinds = {"SQLite": "sqlite"}
        if os.environ.get("TEST_POSTGRES_URL"):
            kinds["PostgreSQL"] = "postgresql"
        for name, kind in kinds.items():
            url = stack.enter_context(fresh_database(kind, folder))
            fill(url)
            other = "the guide's way" if kind == "sqlite" else "the book's way"
            apps = {"this service": "main:app", other: "benchmarks.read_baselines:app"}
            for way, app in apps.items():
                environment = {"DATABASE_URL": url, "LOG_LEVEL": "WARNING"}
                server = Server(environment, folder / f"log {way} {name}", app=app)
                stack.callback(server.kill)
                server.wait_for("/health/ready" if app == "main:app" else "/constant/1")
                urls[f"{way}, {name}"] = server.url
        yield urls


async def alone(urls: dict[str, str], path: str, clients: int, args: argparse.Namespace) -> None:
    ways = {way: (url, path) for way, url in urls.items()}
    ways = {"a constant": (urls["the guide's way, SQLite"], "/constant/{}")} | ways
    found: dict[str, list[Round]] = defaultdict(list)
    for _, (way, (url, route)) in itertools.product(range(args.rounds), ways.items()):
        if "guide" in way and clients > 15:
            continue  # its pool has 15 connections; with more clients it can deadlock
        found[way].append(await read(url, route, clients, args.seconds))
    base = statistics.median(one.rate for one in found["a constant"])
    for way, rounds in found.items():
        rate = statistics.median(one.rate for one in rounds)
        p99 = statistics.median(one.quantile(0.99) for one in rounds)
        print(
            f"| {path} | {clients} | {way} | {rate:.0f} | {rate / base:.2f} | {p99 * 1000:.1f} |",
            flush=True,
        )


async def beside_generations(name: str, url: str, args: argparse.Namespace) -> None:
    """Rounds with and without generations in turn."""
    for clients in CLIENTS:
        quiet: list[Round] = []
        busy: list[Round] = []
        for _ in range(args.rounds):
            quiet.append(await read(url, PATHS[0], clients, args.seconds))
            stopping = asyncio.Event()
            writers = [
                asyncio.create_task(generate_until_stopped(url, stopping))
                for _ in range(GENERATIONS)
            ]
            await asyncio.sleep(0.5)
            busy.append(await read(url, PATHS[0], clients, args.seconds))
            stopping.set()
            await asyncio.gather(*writers)
        cells = [f"| {name} | {clients} "]
        p99s = []
        for rounds in (quiet, busy):
            p99s.append(statistics.median(one.quantile(0.99) for one in rounds))
            rate = statistics.median(one.rate for one in rounds)
            cells.append(f"| {rate:.0f} | {p99s[-1] * 1000:.1f} ")
        print("".join(cells) + f"| {p99s[1] / p99s[0]:.2f} |", flush=True)


async def measure(urls: dict[str, str], args: argparse.Namespace) -> None:
    print("| route | clients | way | requests/s | of the constant route | p99 ms |")
    print("|---|---|---|---|---|---|")
    for path, clients in itertools.product(PATHS, CLIENTS):
        await alone(urls, path, clients, args)
    print()
    print(
        "| this service | clients | alone: requests/s | p99 ms | beside 16: /s | p99 ms | ratio |"
    )
    print("|---|---|---|---|---|---|---|")
    for way, url in urls.items():
        if way.startswith("this service"):
            await beside_generations(way, url, args)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="of one round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, servers(Path(folder)) as urls:
        asyncio.run(measure(urls, args))


if __name__ == "__main__":
    main()
