"""Cut the power under SQLite, again and again, and count what was acknowledged and is gone.

    python -m benchmarks.power_cut --cuts 200

A file layer under SQLite holds writes back until SQLite syncs the file. When the power goes, a
random half of what was held back reaches the disk, some of it in part; the rest never does. The
connection is set up by the service's own code, so its pragmas are what is tested. The control, the
same with ``synchronous=NORMAL``, must lose something: else the layer would prove nothing.

Every count that is not 0 is a broken promise, but for the control's, and the exit status says so.
"""

import argparse
import contextlib
import os
import random
import sqlite3
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw

import sqlite_file

SECTOR = 512
COMMITS = 60  # at most, from one start to the cut
TEXT = 12_000  # bytes at most: a row may need several pages


class PowerOffError(Exception):
    """No current."""


@dataclass
class Disk:
    """One file: what is on the disk, what is only in memory, and the writes that lie between."""

    path: str
    memory: bytearray = field(default_factory=bytearray)
    held: list[tuple[int, bytes | None]] = field(default_factory=list)  # None: cut off there

    def __post_init__(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.memory += Path(self.path).read_bytes()

    def write(self, offset: int, data: bytes | None) -> None:
        self.held.append((offset, data))
        put(self.memory, offset, data)

    def sync(self) -> None:
        self.settle(self.held)

    def cut(self, rng: random.Random) -> None:
        """A random half of the held writes, some of them not to their end, is all that is left."""
        kept = [(offset, torn(data, rng)) for offset, data in self.held if rng.random() < 0.5]
        self.settle(kept)

    def settle(self, writes: list[tuple[int, bytes | None]]) -> None:
        """Put writes on the disk."""
        with open(self.path, "r+b") as disk:
            for offset, data in writes:
                if data is None:
                    disk.truncate(offset)
                else:
                    disk.seek(offset)
                    disk.write(data)
        self.held = []


def put(memory: bytearray, offset: int, data: bytes | None) -> None:
    if data is None:
        del memory[offset:]
        return
    memory.extend(b"\0" * max(0, offset + len(data) - len(memory)))
    memory[offset : offset + len(data)] = data


def torn(data: bytes | None, rng: random.Random) -> bytes | None:
    if data is None or rng.random() < 0.7:
        return data
    return data[: rng.randrange(0, len(data) + SECTOR, SECTOR)]


class Machine(apsw.VFS):
    """The files of one run, until its power is cut after so many writes."""

    def __init__(self, rng: random.Random, writes: int) -> None:
        self.name = f"machine-{rng.getrandbits(64)}"
        self.rng = rng
        self.writes = writes
        self.on = True
        self.disks: dict[str, Disk] = {}
        super().__init__(self.name, "")

    def xOpen(self, name: Any, flags: Any) -> Any:  # noqa: N802
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        opened = File(self, name, flags)
        if not path.endswith("-shm"):
            opened.disk = self.disks.setdefault(path, Disk(path))
        return opened

    def xDelete(self, path: str, sync: bool) -> None:  # noqa: N802
        if self.on:
            self.disks.pop(path, None)
            super().xDelete(path, sync)

    def spend(self) -> None:
        """One write; the last one cuts the power."""
        self.writes -= 1
        if self.on and self.writes <= 0:
            self.on = False
            for disk in self.disks.values():
                disk.cut(self.rng)
        if not self.on:
            raise PowerOffError


class File(apsw.VFSFile):
    def __init__(self, machine: Machine, name: Any, flags: Any) -> None:
        super().__init__("", name, flags)
        self.machine = machine
        self.disk: Disk

    def xRead(self, amount: int, offset: int) -> bytes:  # noqa: N802
        return bytes(self.disk.memory[offset : offset + amount])

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        self.disk.write(offset, bytes(data))
        self.machine.spend()

    def xTruncate(self, size: int) -> None:  # noqa: N802
        self.disk.write(size, None)
        self.machine.spend()

    def xSync(self, _: int) -> None:  # noqa: N802
        self.machine.spend()
        self.disk.sync()

    def xFileSize(self) -> int:  # noqa: N802
        return len(self.disk.memory)


class Connection(apsw.Connection):
    """With what the service's set-up asks of a connection of sqlite3's."""

    isolation_level: str | None = None

    def create_function(
        self, name: str, parameters: int, function: Callable[..., Any], deterministic: bool
    ) -> None:
        self.create_scalar_function(name, function, parameters, deterministic=deterministic)


def run_until_cut(file: Path, rng: random.Random, control: bool, rows: dict[int, str]) -> None:
    """Commit rows until the power goes; ``rows`` gets what was acknowledged."""
    machine = Machine(rng, writes=rng.randrange(1, COMMITS * 6))
    connection = None
    try:
        connection = Connection(str(file), vfs=machine.name)
        sqlite_file.set_up(connection)  # type: ignore[arg-type]
        if control:
            connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("PRAGMA wal_autocheckpoint=100")  # or the file itself is hardly written
        for _ in range(COMMITS):
            commit_one(connection, rng, rows)
        machine.writes = 0
        machine.spend()
    except (PowerOffError, apsw.Error):
        assert not machine.on
    finally:
        if connection is not None:
            with contextlib.suppress(PowerOffError, apsw.Error):
                connection.close(True)
        machine.unregister()


def commit_one(connection: Any, rng: random.Random, rows: dict[int, str]) -> None:
    """A new row, or another text for an old one. It is acknowledged when the commit returns."""
    text = rng.choice("abcdefgh") * rng.randrange(TEXT)
    id = rng.choice(list(rows)) if rows and rng.random() < 0.3 else max(rows, default=0) + 1
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("INSERT OR REPLACE INTO records VALUES (?, ?)", (id, text))
    rows.pop(id, None)  # until the commit returns, either text may be found
    connection.execute("COMMIT")
    rows[id] = text


def judge(file: Path, rows: dict[int, str]) -> Counter[str]:
    """Open the file as after a restart, and compare."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{file}-shm")  # shared memory does not outlive the power
    counts: Counter[str] = Counter(cuts=1, checked=len(rows))
    try:
        with contextlib.closing(sqlite3.connect(file)) as connection:
            sqlite_file.set_up(connection)
            sound = connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            found = dict(connection.execute("SELECT id, text FROM records"))
    except sqlite3.DatabaseError:
        return counts + Counter({"corrupt": 1})
    counts["corrupt"] += not sound
    counts["lost"] += sum(found.get(id) != text for id, text in rows.items())
    rows.clear()
    rows.update(found)
    return counts


def make(file: Path) -> None:
    with contextlib.closing(sqlite3.connect(file)) as connection:
        sqlite_file.set_up(connection)
        connection.execute("CREATE TABLE records (id INTEGER PRIMARY KEY, text TEXT)")


def cut_power(folder: Path, cuts: int, seed: int, control: bool = False) -> Counter[str]:
    """Counts of what was lost and of files found corrupt. A corrupt file is begun anew."""
    rng = random.Random(seed)
    total: Counter[str] = Counter()
    file = folder / "records.db"
    rows: dict[int, str] = {}
    make(file)
    for _ in range(cuts):
        run_until_cut(file, rng, control, rows)
        counts = judge(file, rows)
        total += counts
        if counts["corrupt"]:
            for leftover in folder.glob("records.db*"):
                leftover.unlink()
            rows.clear()
            make(file)
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cuts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    args = parser.parse_args()
    print(f"seed {args.seed}")
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other:
        found = cut_power(Path(folder), args.cuts, args.seed)
        control = cut_power(Path(other), args.cuts, args.seed, control=True)
    print(f"synchronous=FULL: {dict(found)}")
    print(f"the control, NORMAL: {dict(control)}")
    kept = not found["lost"] and not found["corrupt"]
    return 0 if kept and control["lost"] else 1


if __name__ == "__main__":
    sys.exit(main())
