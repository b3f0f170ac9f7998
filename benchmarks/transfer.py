"""How fast a history moves, and in how much memory: `make bench-db`, or

    python -m benchmarks.transfer --rows 100000 1000000 --databases sqlite postgresql mysql

A history (benchmarks/history_rows.py) is made in SQLite and exported; each database imports it
and exports it again, by `python -m manage` as operators run it, and must give the same bytes.
Seconds are from the command's start to its end; processor seconds and memory are those of all its
processes, memory as the greatest sum of what they had resident, looked at 20 times a second.
"""

import argparse
import filecmp
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.history_rows import fill
from database import Database
from tests.databases import KINDS, VARIABLES, fresh_database
from tests.service import ROOT

LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class Cost:
    seconds: float
    processor_seconds: float
    peak_bytes: int


def manage(url: str, *arguments: str) -> Cost:
    """Run a command on a database to its end."""
    command = [sys.executable, "-m", "manage", *arguments]
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"DATABASE_URL": url}, stderr=subprocess.DEVNULL
    )
    while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
        peak = max(peak, resident(process.pid))
        time.sleep(LOOK_SECONDS)
    _, status, used = ended
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, arguments
    return Cost(time.perf_counter() - start, used.ru_utime + used.ru_stime, peak)


def resident(process: int) -> int:
    """Bytes of a process and of those it started; 0 for one that has ended."""
    try:
        folder = Path(f"/proc/{process}")
        pages = int((folder / "statm").read_text().split()[1])
        started = (folder / f"task/{process}/children").read_text().split()
    except (OSError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(resident(int(child)) for child in started)


def make(rows: int, folder: Path) -> Path:
    """A history's export."""
    url, file = f"sqlite:///{folder / 'made.db'}", folder / "made.ndjson"
    database = Database(url, timeout=600)
    database.migrate()
    fill(database, rows)
    database.close()
    manage(url, "export", "--out", str(file))
    (folder / "made.db").unlink()
    return file


def measure(kind: str, rows: int, made: Path, folder: Path) -> None:
    out = folder / f"{kind}.ndjson"
    with fresh_database(kind, folder) as url:
        manage(url, "migrate")
        report(f"{kind}, import", rows, manage(url, "import", str(made)))
        report(f"{kind}, export", rows, manage(url, "export", "--out", str(out)))
    assert filecmp.cmp(made, out, shallow=False)
    out.unlink()


def report(name: str, rows: int, cost: Cost) -> None:
    print(
        f"{name:20} {rows:10,} rows {rows / cost.seconds:8,.0f} a second"
        f" ({cost.processor_seconds / rows * 1e6:3.0f} µs of processor time a row),"
        f" {cost.peak_bytes / 1e6:4.0f} MB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure export and import.")
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000])
    parser.add_argument("--databases", nargs="+", default=at_hand(), choices=KINDS)
    arguments = parser.parse_args()
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory(prefix="transfer-") as folder:
            made = make(rows, Path(folder))
            for kind in arguments.databases:
                measure(kind, rows, made, Path(folder))


def at_hand() -> list[str]:
    return [kind for kind in KINDS if kind not in VARIABLES or VARIABLES[kind] in os.environ]


if __name__ == "__main__":
    main()
