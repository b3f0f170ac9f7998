"""Kill the service again and again under retries, and count what was done twice.

    python -m benchmarks.once_test --kills 20

Twenty keys a round, each asked for by ten clients until one of them is answered; meanwhile the
server is killed with SIGKILL and started again, once a round. For every key there must be one
record, one text in all answers, and no more attempts than the kills account for. Exits with 1
otherwise. Stops only processes that it started.
"""

import argparse
import random
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from contextlib import closing
from pathlib import Path

import httpx

from benchmarks.promises import report
from tests.service import Server, free_port

PATIENCE_SECONDS = 300.0  # a key's clients ask for so long


class Answers:
    """The records that clients were given for each key."""

    def __init__(self) -> None:
        self.by_key: dict[str, set[tuple[int, str]]] = defaultdict(set)
        self.statuses: Counter[int] = Counter()
        self.lock = threading.Lock()

    def add(self, key: str, answer: httpx.Response) -> None:
        with self.lock:
            self.statuses[answer.status_code] += 1
            if answer.status_code == 200:
                record = answer.json()
                self.by_key[key].add((record["id"], record["generated_text"]))


def ask(url: str, key: str, answers: Answers, wait: float) -> None:
    """One client: the same request until it is answered."""
    body = {"prompt": f"Once upon a time {key} there was", "max_length": 120}
    deadline = time.monotonic() + PATIENCE_SECONDS
    time.sleep(wait)
    with httpx.Client(timeout=60) as client:
        while time.monotonic() < deadline:
            try:
                answer = client.post(url, json=body, headers={"Idempotency-Key": key})
            except httpx.HTTPError:
                time.sleep(0.5)  # a server that starts needs the processor more
                continue
            answers.add(key, answer)
            if answer.status_code == 200:
                return
            time.sleep(0.1)


def torture(kills: int, keys: int, clients: int, seed: int, folder: Path) -> Counter[str]:
    chance = random.Random(seed)
    file, port = folder / "records.db", free_port()
    environment = {"DATABASE_URL": f"sqlite:///{file}"}
    answers = Answers()
    server = Server(environment, folder / "log", port).wait_until_ready()
    try:
        for kill in range(kills):
            names = [f"{kill}-{number}" for number in range(keys)]
            threads = [
                threading.Thread(
                    target=ask,
                    args=(f"{server.url}/generate", name, answers, chance.uniform(0, 0.5)),
                    daemon=True,
                )
                for name in names
                for _ in range(clients)
            ]
            for thread in threads:
                thread.start()
            time.sleep(chance.uniform(0.1, 1.5))
            server.kill()
            server = Server(environment, folder / "log", port).wait_until_ready()
            for thread in threads:
                thread.join()
    finally:
        server.kill()
    return counted(file, answers, kills, keys)


def counted(file: Path, answers: Answers, kills: int, keys: int) -> Counter[str]:
    with closing(sqlite3.connect(file)) as connection:
        rows = connection.execute(
            "SELECT idempotency_key, id, prompt || completion, attempts FROM generation_records"
        ).fetchall()
    found = {key: (record, text) for key, record, text, _ in rows}
    counts = Counter({"kills": kills, "keys": keys * kills, "records": len(rows)})
    counts["answers"] = sum(answers.statuses.values())
    counts["run again after a kill"] = sum(attempts > 1 for *_, attempts in rows)
    counts["P2 keys without a record"] = keys * kills - len(answers.by_key)
    counts["P3 records beyond one a key"] = len(rows) - len(found)
    counts["P1 other text"] = sum(answers.by_key[key] != {found[key]} for key in answers.by_key)
    counts["P3 attempts too many"] = sum(attempts > 2 for *_, attempts in rows)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--keys", type=int, default=20)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = torture(
            arguments.kills, arguments.keys, arguments.clients, arguments.seed, Path(folder)
        )
    return report(counts)


if __name__ == "__main__":
    sys.exit(main())
