"""Faults of the database under load: every record that was answered is there, and no other.

    python -m benchmarks.faults postgresql --times 20   restarted, `fast` and `immediate` in turn
    python -m benchmarks.faults mariadb --times 10      killed and started again
    python -m benchmarks.faults locked --times 1        SQLite locked by another for 30 s
    python -m benchmarks.faults full --times 3          the disk full, then not (needs root)
    python -m benchmarks.faults taken --times 3         the SQLite file moved away and back
    python -m benchmarks.faults replaced --times 1      the SQLite file replaced by another

16 clients post with no retries, each prompt once. Afterwards the rows are compared with what was
answered. Every count that is named after a promise must be 0, and the exit status says so.
Servers are this command's own; nothing else is touched.
"""

import argparse
import asyncio
import contextlib
import itertools
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import Row, create_engine, text

from benchmarks.promises import report
from connections import normalise_url
from database import Database
from tests.database_servers import MariaDb, Postgres, running
from tests.service import Server

CLIENTS = 16
SETTLE_SECONDS = 30.0
LOCKED_SECONDS = 30.0
FULL_SECONDS = 8.0  # as long as an ending is tried for, and then some: 503s must come
TERMINAL = {"completed", "incomplete", "failed", "cancelled"}


class Load:
    """Posts prompts, each once, until told to stop, and keeps what was answered to each."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.numbers = itertools.count()
        self.answers: dict[str, tuple[int, dict[str, Any]]] = {}
        self.refused = 0
        self.stopping = False

    async def client(self) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=120) as client:
            while not self.stopping:
                prompt = f"King {next(self.numbers)} said"
                body = {"prompt": prompt, "max_length": 60}
                answer = await client.post("/generate", json=body)
                self.answers[prompt] = answer.status_code, answer.json()
                if answer.status_code != 200:
                    self.refused += 1
                    await asyncio.sleep(0.1)

    async def during(self, fault: "Fault") -> None:
        """Post before, while and after something goes wrong."""
        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(self.client())
            await asyncio.sleep(1.0)
            try:
                await asyncio.to_thread(fault, self)
                await asyncio.sleep(1.0)
            finally:
                self.stopping = True

    def wait_for_refusal(self, before: int) -> None:
        """Until more than ``before`` requests were refused, in another thread than its own."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while self.refused <= before and time.monotonic() < deadline:
            time.sleep(0.1)


Fault = Callable[[Load], None]


def rows_of(url: str) -> list[Row[Any]]:
    engine = create_engine(normalise_url(url))
    statement = "SELECT id, prompt, completion, status, source_id FROM generation_records"
    with engine.connect() as connection:
        found = list(connection.execute(text(statement)))
    engine.dispose()
    return found


def settled_rows(url: str) -> list[Row[Any]]:
    """The rows, once none is open any more or the patience is over."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        rows = rows_of(url)
        if all(row.status in TERMINAL for row in rows) or time.monotonic() > deadline:
            return rows
        time.sleep(0.2)


def judge(rows: list[Row[Any]], answers: dict[str, tuple[int, dict[str, Any]]]) -> Counter[str]:
    counts: Counter[str] = Counter(requests=len(answers), rows=len(rows))
    by_id = {row.id: row for row in rows}
    prompts = Counter(row.prompt for row in rows)
    counts["P2 open"] = sum(row.status not in TERMINAL for row in rows)
    counts["P3 doubled"] = sum(count - 1 for count in prompts.values())
    counts["P2 phantom"] = sum(prompt not in answers for prompt in prompts)
    accounted = {body.get("id") for _, body in answers.values()}
    counts["P7 completed but refused"] = sum(
        row.status == "completed" and row.id not in accounted for row in rows
    )
    for status, body in answers.values():
        counts[f"{status} {body.get('code', '')}".strip()] += 1
        if status not in (200, 503):
            counts["P7 answers other than 200 and 503"] += 1
        row = by_id.get(body.get("id"))
        if "id" in body and row is None:
            counts["P1 lost"] += 1
        if status == 200 and row is not None:
            whole = (row.prompt + row.completion, row.status)
            counts["P1 other text"] += whole != (body["generated_text"], "completed")
    return counts


def drill(url: str, folder: Path, fault: Fault, **settings: str) -> Counter[str]:
    """Run a service on a database, do the fault under load, and compare."""
    environment = {"DATABASE_URL": url, "LOG_LEVEL": "WARNING"} | settings
    server = Server(environment, folder / "log").wait_until_ready()
    try:
        load = Load(server.url)
        asyncio.run(load.during(fault))
        server.wait_until_ready()  # it works again without a restart
        answer = httpx.post(f"{server.url}/generate", json={"prompt": "Again"}, timeout=60)
        load.answers["Again"] = answer.status_code, answer.json()
        counts = judge(settled_rows(url), load.answers)
        counts["P7 not well again"] = answer.status_code != 200
    finally:
        server.kill()
    return counts


def postgresql(folder: Path, times: int) -> Counter[str]:
    with running(Postgres(), last="immediate") as server:

        def restart(_load: Load) -> None:
            for _, mode in zip(range(times), itertools.cycle(("immediate", "fast")), strict=False):
                server.stop(mode)
                server.start()
                time.sleep(1.0)

        return drill(server.url, folder, restart)


def mariadb(folder: Path, times: int) -> Counter[str]:
    with running(MariaDb(folder), last="kill") as server:

        def restart(_load: Load) -> None:
            for _ in range(times):
                server.stop("kill")
                server.start()
                time.sleep(1.0)

        return drill(server.url, folder, restart)


def locked(
    folder: Path, times: int, seconds: float = LOCKED_SECONDS, patience: float = 5.0
) -> Counter[str]:
    file = folder / "records.db"

    def lock(_load: Load) -> None:
        for _ in range(times):
            with contextlib.closing(sqlite3.connect(file, timeout=60)) as other:
                other.execute("BEGIN IMMEDIATE")
                time.sleep(seconds)
            time.sleep(1.0)

    return drill(f"sqlite:///{file}", folder, lock, DATABASE_TIMEOUT_SECONDS=str(patience))


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 8 MiB in memory; only root may make one."""
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(disk)], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def full(folder: Path, times: int) -> Counter[str]:
    with small_disk(folder) as disk:
        ballast = disk / "ballast"

        def fill(load: Load) -> None:
            for _ in range(times):
                refused = load.refused
                with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as opened:
                    while True:
                        opened.write(b"x" * 4096)
                time.sleep(FULL_SECONDS)
                load.wait_for_refusal(refused)  # the file has room of its own for some rows
                ballast.unlink()
                time.sleep(1.0)

        return drill(f"sqlite:///{disk / 'records.db'}", folder, fill)


def taken(folder: Path, times: int) -> Counter[str]:
    file = folder / "records.db"
    away = folder / "away.db"

    def take(_load: Load) -> None:
        for _ in range(times):
            file.rename(away)
            time.sleep(1.0)
            if file.exists():
                raise AssertionError("a new file was made over the known path")
            away.rename(file)
            time.sleep(1.0)

    return drill(f"sqlite:///{file}", folder, take)


def replaced(folder: Path, times: int) -> Counter[str]:
    """Another database lies where the service's was: it must not get a single row."""
    file, other, away = folder / "records.db", folder / "other.db", folder / "away.db"
    database = Database(f"sqlite:///{other}")
    database.migrate()
    database.close()

    def replace(_load: Load) -> None:
        for _ in range(times):
            file.rename(away)
            other.rename(file)
            time.sleep(1.0)
            file.rename(other)
            away.rename(file)
            time.sleep(1.0)

    counts = drill(f"sqlite:///{file}", folder, replace)
    counts["P7 rows in another's file"] = len(rows_of(f"sqlite:///{other}"))
    return counts


FAULTS: dict[str, Callable[[Path, int], Counter[str]]] = {
    fault.__name__: fault for fault in (postgresql, mariadb, locked, full, taken, replaced)
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("fault", choices=FAULTS)
    parser.add_argument("--times", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = FAULTS[args.fault](Path(folder), args.times)
    return report(counts)


if __name__ == "__main__":
    sys.exit(main())
