"""Back a database up while it is written to, restore the copy elsewhere, and count what is missing.

    python -m benchmarks.backup_drill --drills 15

Two processes store records as fast as they can and tell each one's id after its commit. What they
had told when `manage backup` began must be in what `manage restore` makes of the backup, with its
text; the restored database must pass `manage check`. Runs on SQLite, and on PostgreSQL and MySQL
where TEST_POSTGRES_URL and TEST_MYSQL_URL name servers; exits with 1 after a loss.
"""

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import text

from benchmarks.promises import report
from database import Database
from tests.databases import KINDS, VARIABLES, fresh_database
from tests.service import ROOT

WRITERS = 2
WRITER = """
import os
from benchmarks.promises import report
from database import Database
from tests.test_history import insert
database = Database(os.environ["DATABASE_URL"], timeout=30)
database.expect_schema()
with database.sessions() as session:
    number = 0
    while True:
        number += 1
        mark = f"{os.getpid()}/{number}"
        print(insert(session, prompt=mark, completion=" and on" * 40), mark, flush=True)
"""


class Writers:
    """Processes that store records, and what they were acknowledged."""

    def __init__(self, url: str) -> None:
        self.acknowledged: dict[int, str] = {}
        environment = os.environ | {"DATABASE_URL": url}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(WRITERS)
        ]
        self.listeners = [
            threading.Thread(target=self.listen, args=(process,), daemon=True)
            for process in self.processes
        ]
        for listener in self.listeners:
            listener.start()
        while len(self.acknowledged) < WRITERS * 10:
            time.sleep(0.01)

    def listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                if line.endswith("\n"):
                    id, mark = line.split()
                    self.acknowledged[int(id)] = mark

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for listener in self.listeners:
            listener.join()


@contextlib.contextmanager
def writing(url: str) -> Iterator[Writers]:
    writers = Writers(url)
    try:
        yield writers
    finally:
        writers.stop()


def manage(url: str, *arguments: str) -> int:
    environment = os.environ | {"DATABASE_URL": url}
    command = [sys.executable, "-m", "manage", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL).returncode


def stored(url: str) -> dict[int, str]:
    database = Database(url)
    with database.engine.connect() as connection:
        found = connection.execute(text("SELECT id, prompt FROM generation_records")).all()
    database.close()
    return {id: prompt for id, prompt in found}


def drill(kind: str, drills: int, folder: Path) -> Counter[str]:
    """Several backups of one database under load, each restored and compared."""
    counts, chance = Counter[str](), random.Random(1)
    (folder / kind).mkdir()
    with fresh_database(kind, folder / kind) as url:
        assert manage(url, "migrate") == 0
        with writing(url) as writers:
            for number in range(drills):
                time.sleep(chance.uniform(0.0, 0.5))
                file, copy = folder / f"{kind}-{number}.backup", folder / f"{kind}-{number}"
                copy.mkdir()
                before = dict(writers.acknowledged)
                assert manage(url, "backup", str(file)) == 0
                during = len(writers.acknowledged) - len(before)
                counts["written meanwhile"] += during
                with fresh_database(kind, copy) as restored:
                    assert manage(restored, "restore", str(file)) == 0
                    found = stored(restored)
                    counts["P10 failed checks"] += manage(restored, "check") != 0
                counts["P10 missing"] += sum(id not in found for id in before)
                counts["P10 other text"] += sum(
                    found[id] != mark for id, mark in before.items() if id in found
                )
                counts["compared"] += len(before)
                counts["drills"] += 1
                file.unlink()
                print(f"{kind} {number + 1}/{drills}: {len(before)} before, {during} meanwhile")
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--drills", type=int, default=15)
    options = parser.parse_args()
    status = 0
    for kind in KINDS:
        if kind in VARIABLES and VARIABLES[kind] not in os.environ:
            print(f"{kind}: {VARIABLES[kind]} names no server, left out")
            continue
        with tempfile.TemporaryDirectory() as folder:
            counts = drill(kind, options.drills, Path(folder))
        status |= report(counts, kind)
    return status


if __name__ == "__main__":
    sys.exit(main())
