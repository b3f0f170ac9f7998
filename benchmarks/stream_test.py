"""Torture for streams: kill the process, hang up, open hundreds; count what promises were broken.

    python -m benchmarks.stream_test --kills 200      kill -9 under 16 streaming clients
    python -m benchmarks.stream_test --hangups 100    clients that leave at random moments
    python -m benchmarks.stream_test --streams 200    that many at once, and is it alive meanwhile
    python -m benchmarks.stream_test --stops 50       SIGTERM under 16 clients and half a request
    python -m benchmarks.stream_test --locked 10      the database locked for 10 s under streams

Every count that is named after a promise must be 0, and the exit status says so. The server is
started here, on the bundled model and a database of its own; nothing else is touched.
"""

import argparse
import asyncio
import contextlib
import itertools
import multiprocessing
import random
import sqlite3
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from benchmarks.promises import report
from tests.service import Server, serving
from tests.sse import event_of

if TYPE_CHECKING:
    from multiprocessing.queues import Queue
    from multiprocessing.synchronize import Event

CLIENTS = 16
GAP_ROUNDS = 7
ARRIVAL_SECONDS = 3.0  # a hundred in one moment is what --streams is for
PROMPT = "Once upon a time there was"
TERMINAL = {"completed", "incomplete", "failed", "cancelled"}


@dataclass
class Seen:
    """What a client saw of one stream: when it had how much of the text, and how it ended."""

    record_id: int | None = None
    text: str = ""
    history: list[tuple[float, int]] = field(default_factory=list)
    end: str | None = None
    done: dict[str, Any] | None = None

    def worst_gap(self) -> float:
        """The longest time between two pieces, in seconds."""
        return max((b - a for (a, _), (b, _) in itertools.pairwise(self.history)), default=0.0)

    def length_at(self, moment: float) -> int:
        return max((length for when, length in self.history if when <= moment), default=0)


async def follow(
    client: httpx.AsyncClient, rng: random.Random, leave_after: int | None = None
) -> Seen:
    """Read one stream, to its end or for so many events."""
    seen = Seen()
    body = {"prompt": PROMPT, "max_length": rng.choice([60, 120, 200]), "seed": rng.getrandbits(40)}
    fields: dict[str, str] = {}
    count = 0
    try:
        async with client.stream("POST", "/generate/stream", json=body) as answer:
            if answer.status_code != 200:
                seen.end = str(answer.status_code)
            async for line in answer.aiter_lines():
                event = event_of(fields, line)
                if event is None:
                    continue
                count += 1
                if event.name == "start":
                    seen.record_id = event.data["id"]
                elif event.name == "token":
                    seen.text += event.data["text"]
                    seen.history.append((time.monotonic(), len(seen.text)))
                else:
                    seen.end = str(event.data.get("code", event.name))
                    seen.done = event.data if event.name == "done" else None
                if leave_after is not None and count > leave_after:
                    break
    except httpx.HTTPError as error:
        seen.end = type(error).__name__
    return seen


async def stream_until_killed(server: Server, rng: random.Random) -> tuple[list[Seen], float]:
    found: list[Seen] = []
    limits = httpx.Limits(max_connections=CLIENTS)
    async with httpx.AsyncClient(base_url=server.url, timeout=30, limits=limits) as client:

        async def one_after_the_other() -> None:
            while server.process.is_alive():
                found.append(await follow(client, rng))

        tasks = [asyncio.create_task(one_after_the_other()) for _ in range(CLIENTS)]
        await asyncio.sleep(rng.uniform(0.3, 3.0))
        killed = time.monotonic()
        server.process.kill()
        await asyncio.gather(*tasks)
    server.process.join()
    return found, killed


def judge_kill(server: Server, found: list[Seen], killed: float) -> Counter[str]:
    """Compare what clients saw with what the restarted service has."""
    counts: Counter[str] = Counter()
    time.sleep(1.0)
    with httpx.Client(base_url=server.url, timeout=30) as client:
        for seen in found:
            if seen.record_id is None:
                continue
            counts["streams"] += 1
            answer = client.get(f"/history/{seen.record_id}")
            row = answer.json()
            if answer.status_code != 200:
                counts["P2 accepted, no row"] += 1
                continue
            if row["status"] not in TERMINAL:
                counts["P2 not terminal"] += 1
            if seen.done is not None:
                counts["completed"] += 1
                if row != seen.done:
                    counts["P1 answered, not stored so"] += 1
                continue
            counts["cut"] += 1
            stored = row["generated_text"].removeprefix(PROMPT)
            if not stored.startswith(seen.text[: seen.length_at(killed - 1.0)]):
                counts["P4 seen a second before, not stored"] += 1
    return counts


def kills(folder: Path, count: int, rng: random.Random) -> Counter[str]:
    total: Counter[str] = Counter()
    environment = {"DATABASE_URL": f"sqlite:///{folder / 'records.db'}", "LOG_LEVEL": "WARNING"}
    server = Server(environment, folder / "log").wait_until_ready()
    try:
        for number in range(count):
            found, killed = asyncio.run(stream_until_killed(server, rng))
            server = Server(environment, folder / "log")
            server.wait_until_ready()
            total += judge_kill(server, found, killed)
            print(f"kill {number + 1}: {dict(total)}", flush=True)
    finally:
        server.kill()
    return total


async def hang_up(server: Server, count: int, rng: random.Random, leaving: bool) -> list[Seen]:
    """Clients that come and leave at random moments, or stay."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:

        async def come() -> Seen:
            await asyncio.sleep(rng.uniform(0, ARRIVAL_SECONDS))
            return await follow(client, rng, leave_after=rng.randrange(60) if leaving else None)

        return list(await asyncio.gather(*(come() for _ in range(count))))


def others(url: str, results: "Queue[float]", stopping: "Event") -> None:
    """The worst gap of streams that stay, read in a process that does nothing else."""
    results.put(asyncio.run(worst_gap(url, stopping)))


async def worst_gap(url: str, stopping: "Event") -> float:
    rng = random.Random(0)
    gaps = [0.0]
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:

        async def stay() -> None:
            while not stopping.is_set():
                gaps.append((await follow(client, rng)).worst_gap())

        await asyncio.gather(*(stay() for _ in range(CLIENTS)))
    return max(gaps)


def hang_up_beside_others(
    server: Server, count: int, rng: random.Random, leaving: bool
) -> tuple[list[Seen], float]:
    processes = multiprocessing.get_context("spawn")
    results, stopping = processes.Queue(), processes.Event()
    reader = processes.Process(target=others, args=(server.url, results, stopping))
    reader.start()
    time.sleep(3.0)  # until they are at it
    found = asyncio.run(hang_up(server, count, rng, leaving))
    stopping.set()
    gap = results.get()
    reader.join()
    return found, gap


def hangups(folder: Path, count: int, rng: random.Random) -> Counter[str]:
    total: Counter[str] = Counter()
    environment = {"DATABASE_URL": f"sqlite:///{folder / 'records.db'}", "LOG_LEVEL": "WARNING"}
    gaps: dict[bool, list[float]] = {False: [], True: []}
    with serving(folder / "log", **environment) as server:
        asyncio.run(hang_up(server, count, rng, False))  # the first steps of a process are slow
        for leaving in (False, True) * GAP_ROUNDS:
            found, gap = hang_up_beside_others(server, count, rng, leaving)
            gaps[leaving].append(gap)
            time.sleep(1.0)
            if leaving:
                total += judge_hangups(server, found)
    quiet, disturbed = (statistics.median(gaps[leaving]) * 1000 for leaving in (False, True))
    rounds = {leaving: [round(gap * 1000) for gap in gaps[leaving]] for leaving in gaps}
    print(f"worst gap, staying {quiet:.0f} ms, hanging up {disturbed:.0f} ms: {rounds}")
    total["P6 gap grows by more than a fifth"] = disturbed > quiet * 1.2
    return total


def judge_hangups(server: Server, found: list[Seen]) -> Counter[str]:
    counts: Counter[str] = Counter()
    with httpx.Client(base_url=server.url, timeout=30) as client:
        for seen in found:
            row = client.get(f"/history/{seen.record_id}").json()
            counts[f"{row['status']}/{row['finish_reason']}"] += 1
            if row["status"] not in TERMINAL:
                counts["P2 not terminal"] += 1
            if not row["generated_text"].startswith(PROMPT + seen.text):
                counts["P4 seen, not stored"] += 1
        ready = client.get("/health/ready").json()
    counts["P2 still in the engine"] += ready["running"] + ready["waiting"]
    return counts


async def stream_until_stopped(server: Server, rng: random.Random) -> float:
    """Stop the server under load, with half a request open; the seconds it took to end."""
    limits = httpx.Limits(max_connections=CLIENTS)
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{")
    async with httpx.AsyncClient(base_url=server.url, timeout=30, limits=limits) as client:

        async def one_after_the_other() -> None:
            while server.process.is_alive():
                await follow(client, rng)

        tasks = [asyncio.create_task(one_after_the_other()) for _ in range(CLIENTS)]
        await asyncio.sleep(rng.uniform(0.3, 2.0))
        began = time.monotonic()
        server.process.terminate()
        while server.process.is_alive() and time.monotonic() - began < 60:
            await asyncio.sleep(0.02)
        seconds = time.monotonic() - began
        await asyncio.gather(*tasks)
    writer.close()
    return seconds


def stops(folder: Path, count: int, rng: random.Random) -> Counter[str]:
    total: Counter[str] = Counter()
    file = folder / "records.db"
    for number in range(count):
        grace = rng.choice([0.0, 0.5, 2.0])
        environment = {"DATABASE_URL": f"sqlite:///{file}", "LOG_LEVEL": "WARNING"}
        environment["DRAIN_SECONDS"] = str(grace)
        server = Server(environment, folder / "log").wait_until_ready()
        try:
            seconds = asyncio.run(stream_until_stopped(server, rng))
        finally:
            server.kill()
        total["stops"] += 1
        total["P8 late"] += seconds > grace + 2
        with contextlib.closing(sqlite3.connect(file)) as connection:
            rows = connection.execute(
                "SELECT status, count(*) FROM generation_records GROUP BY status"
            )
            statuses = dict(rows.fetchall())
        total["P8 open rows"] += statuses.get("in_progress", 0)
        print(f"stop {number + 1}: {seconds:.2f} s of {grace} s, {statuses}", flush=True)
    return total


def count_rows(file: Path) -> int:
    with contextlib.closing(sqlite3.connect(file)) as connection:
        return int(connection.execute("SELECT count(*) FROM generation_records").fetchone()[0])


async def stream_under_lock(server: Server, file: Path, seconds: float) -> list[Seen]:
    rng = random.Random(0)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        streams = [asyncio.create_task(follow(client, rng)) for _ in range(CLIENTS)]
        while count_rows(file) < CLIENTS:
            await asyncio.sleep(0.01)
        with contextlib.closing(sqlite3.connect(file)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            await asyncio.sleep(seconds)
        return list(await asyncio.gather(*streams))


def locked(folder: Path, seconds: int, _: random.Random) -> Counter[str]:
    total: Counter[str] = Counter()
    file = folder / "records.db"
    environment = {"DATABASE_URL": f"sqlite:///{file}", "LOG_LEVEL": "WARNING"}
    server = Server(environment, folder / "log").wait_until_ready()
    try:
        found = asyncio.run(stream_under_lock(server, file, seconds))
        time.sleep(2.0)
        with httpx.Client(base_url=server.url, timeout=30) as client:
            for seen in found:
                total[str(seen.end)] += 1
                if seen.record_id is None:
                    continue
                row = client.get(f"/history/{seen.record_id}").json()
                total["P2 not terminal"] += row["status"] not in TERMINAL
                total["P7 done, not stored"] += seen.done is not None and row != seen.done
    finally:
        server.kill()
    return total


def probe(url: str, results: "Queue[list[float]]", stopping: "Event") -> None:
    """How long `/health/live` takes, asked from a process that does nothing else."""
    seconds = []
    with httpx.Client(base_url=url, timeout=30) as client:
        while not stopping.is_set():
            began = time.perf_counter()
            client.get("/health/live").raise_for_status()
            seconds.append(time.perf_counter() - began)
            time.sleep(0.05)
    results.put(seconds)


async def open_many(server: Server, count: int, rng: random.Random) -> list[Seen]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:
        return list(await asyncio.gather(*(follow(client, rng) for _ in range(count))))


def many(folder: Path, count: int, rng: random.Random) -> Counter[str]:
    total: Counter[str] = Counter()
    environment = {"DATABASE_URL": f"sqlite:///{folder / 'records.db'}", "LOG_LEVEL": "WARNING"}
    processes = multiprocessing.get_context("spawn")
    results, stopping = processes.Queue(), processes.Event()
    with serving(folder / "log", **environment) as server:
        prober = processes.Process(target=probe, args=(server.url, results, stopping))
        prober.start()
        found = asyncio.run(open_many(server, count, rng))
        stopping.set()
        seconds = sorted(results.get())
        prober.join()
    middle, slowest = statistics.median(seconds), seconds[-1]
    print(f"/health/live: {len(seconds)} times, median {middle * 1000:.0f} ms,", end=" ")
    print(f"slowest {slowest * 1000:.0f} ms")
    total["P6 alive, but after more than 100 ms"] = sum(one > 0.1 for one in seconds)
    for seen in found:
        total["done" if seen.done is not None else f"P6 not completed: {seen.end}"] += 1
        if seen.done is not None and seen.done["generated_text"] != PROMPT + seen.text:
            total["P1 answered, not stored so"] += 1
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--hangups", type=int, default=0)
    parser.add_argument("--streams", type=int, default=0)
    parser.add_argument("--stops", type=int, default=0)
    parser.add_argument("--locked", type=int, default=0, help="seconds")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    status = 0
    runs = (
        (kills, args.kills),
        (hangups, args.hangups),
        (many, args.streams),
        (stops, args.stops),
        (locked, args.locked),
    )
    for run, count in runs:
        if not count:
            continue
        with tempfile.TemporaryDirectory() as folder:
            total = run(Path(folder), count, rng)
        status |= report(total, run.__name__)
    return status


if __name__ == "__main__":
    sys.exit(main())
