"""Kill the service again and again under load, and count what was lost. Every loss must be 0.

    python -m benchmarks.kill_test --kills 100

Clients post to one server on one SQLite file; at a random moment the server is killed with
SIGKILL and started again. After each start, every answer that any client ever saw whole is read
from the history and compared, no record may be in progress when the patience is over, and no id
may have been answered twice. Stops only processes that it started, and exits with 1 after a loss.
"""

import argparse
import random
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.promises import report
from tests.service import Server

FIRST_ANSWER_SECONDS = 60.0
PATIENCE_SECONDS = 5.0  # from the restart until no record may be in progress


@dataclass
class Answers:
    """What clients saw whole."""

    texts: dict[int, str] = field(default_factory=dict)
    twice: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, answer: httpx.Response) -> None:
        with self.lock:
            self.statuses[answer.status_code] += 1
            if answer.status_code == 200:
                record = answer.json()
                self.twice += record["id"] in self.texts
                self.texts[record["id"]] = record["generated_text"]


def post_until(stopping: threading.Event, url: str, answers: Answers, seed: int) -> None:
    """One client. A request that the kill cut off counts for nothing."""
    chance = random.Random(seed)
    with httpx.Client(timeout=60) as client:
        while not stopping.is_set():
            body: dict[str, Any] = {
                "prompt": f"Once upon a time there were {chance.randrange(1000)} kings",
                "max_length": chance.randrange(20, 120),
            }
            try:
                answer = client.post(url + "/generate", json=body)
                answer.read()
            except httpx.HTTPError:
                stopping.wait(0.02)
                continue
            answers.add(answer)


def rows(file: Path) -> dict[int, tuple[str, str]]:
    """Every record's text and status, read from the file by another connection."""
    with closing(sqlite3.connect(file, timeout=30)) as connection:
        found = connection.execute(
            "SELECT id, prompt || completion, status FROM generation_records"
        ).fetchall()
    return {id: (text, status) for id, text, status in found}


def still_open(file: Path) -> int:
    """Records in progress once the patience is over; nothing runs meanwhile."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        count = sum(status == "in_progress" for _, status in rows(file).values())
        if not count or time.monotonic() > deadline:
            return count
        time.sleep(0.1)


def check_over_http(url: str, answers: Answers, sample: random.Random) -> int:
    """Differences between some answers and what the history gives for them."""
    chosen = sample.sample(sorted(answers.texts), min(50, len(answers.texts)))
    with httpx.Client(timeout=60) as client:
        found = {id: client.get(f"{url}/history/{id}").json() for id in chosen}
    return sum(found[id].get("generated_text") != answers.texts[id] for id in chosen)


def wait_for_an_answer(answers: Answers) -> None:
    deadline = time.monotonic() + FIRST_ANSWER_SECONDS
    while not answers.texts and time.monotonic() < deadline:
        time.sleep(0.01)


def torture(kills: int, clients: int, seed: int, folder: Path) -> Counter[str]:
    chance = random.Random(seed)
    file, log = folder / "records.db", folder / "log"
    environment = {"DATABASE_URL": f"sqlite:///{file}"}
    answers, counts = Answers(), Counter[str]()
    server = Server(environment, log)
    try:
        server.wait_until_ready()
        for kill in range(kills):
            stopping = threading.Event()
            threads = [
                threading.Thread(
                    target=post_until,
                    args=(stopping, server.url, answers, chance.getrandbits(32)),
                    daemon=True,
                )
                for _ in range(clients)
            ]
            for thread in threads:
                thread.start()
            time.sleep(chance.uniform(0.05, 2.0))
            if kill == 0:
                wait_for_an_answer(answers)  # new clients take a while to begin
            server.kill()
            stopping.set()
            for thread in threads:
                thread.join()
            counts["cut off while generating"] += sum(
                status == "in_progress" for _, status in rows(file).values()
            )
            server = Server(environment, log, server.port).wait_until_alive()
            counts["P2 still in progress"] += still_open(file)
            stored = rows(file)
            counts["P1 not stored"] += sum(id not in stored for id in answers.texts)
            counts["P1 other text"] += sum(
                stored[id] != (text, "completed")
                for id, text in answers.texts.items()
                if id in stored
            )
            server.wait_until_ready()
            counts["P1 other text"] += check_over_http(server.url, answers, chance)
            counts["kills"] = kill + 1
            print(f"{kill + 1}/{kills} kills, {len(answers.texts)} answered", flush=True)
        counts["records"] = len(rows(file))
    finally:
        server.kill()
    counts["answered"] = len(answers.texts)
    counts["P1 ids twice"] = answers.twice
    counts["P7 answers other than 200 and 503"] = sum(
        count for status, count in answers.statuses.items() if status not in (200, 503)
    )
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    options = parser.parse_args()
    print(f"seed {options.seed}")
    with tempfile.TemporaryDirectory() as folder:
        counts = torture(options.kills, options.clients, options.seed, Path(folder))
    return report(counts)


if __name__ == "__main__":
    sys.exit(main())
