"""Database servers of a test's own, which it may stop, kill and start again."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import redis
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError

from connections import normalise_url
from tests.databases import missing
from tests.service import free_port

START_SECONDS = 60.0


class DatabaseServer:
    """``url`` names an empty database on it. A folder of its own; its port stays the same."""

    url: str
    folder: Path

    def start(self) -> None:
        raise NotImplementedError

    def stop(self, mode: str) -> None:
        raise NotImplementedError

    def wait_until_up(self) -> None:
        engine = create_engine(normalise_url(self.url))
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                with engine.connect():
                    break
            except DBAPIError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        engine.dispose()


class Postgres(DatabaseServer):
    """Modes to stop: ``fast`` (clients are thrown out), ``immediate`` (as after a crash)."""

    def __init__(self) -> None:
        # As root, PostgreSQL runs as a user who may not enter the folders of tests.
        self.folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        self.port = free_port()
        self.url = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        if os.geteuid() == 0:
            shutil.chown(self.folder, "postgres", "postgres")
        self.run("initdb", "-U", "postgres", "-A", "trust", "--locale=C", "-E", "UTF8")
        with (self.folder / "postgresql.conf").open("a") as settings:
            settings.write(f"port = {self.port}\nunix_socket_directories = '{self.folder}'\n")

    def run(self, program: str, *arguments: str) -> None:
        command = [postgres_program(program), "-D", str(self.folder), *arguments]
        if os.geteuid() == 0:
            command = ["runuser", "-u", "postgres", "--", *command]
        # Not to a pipe: the server would hold it open.
        subprocess.run(command, check=True, cwd=self.folder, stdout=subprocess.DEVNULL, timeout=120)

    def start(self) -> None:
        self.run("pg_ctl", "-w", "-l", str(self.folder / "log"), "start")
        self.wait_until_up()

    def stop(self, mode: str) -> None:
        self.run("pg_ctl", "-w", "-m", mode, "stop")


def postgres_program(name: str) -> str:
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    program = str(found[-1]) if found else shutil.which(name)
    if program is None:
        missing(f"PostgreSQL's {name} is not there")
    return program


class MariaDb(DatabaseServer):
    """Modes to stop: ``kill``, ``fast``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "mariadb"
        self.port = free_port()
        self.url = f"mysql://root@127.0.0.1:{self.port}/mysql_test"
        self.process: subprocess.Popen[bytes] | None = None
        install = shutil.which("mariadb-install-db")
        if install is None:
            missing("mariadb-install-db is not there")
        subprocess.run(
            [install, *self.options(), "--auth-root-authentication-method=normal"],
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=120,
        )

    def options(self) -> list[str]:
        options = ["--no-defaults", f"--datadir={self.folder}"]
        return [*options, "--user=root"] if os.geteuid() == 0 else options

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    shutil.which("mariadbd", path=f"{os.environ['PATH']}:/usr/sbin") or "mariadbd",
                    *self.options(),
                    f"--port={self.port}",
                    "--bind-address=127.0.0.1",
                    f"--socket={self.folder / 'socket'}",
                ],
                stdout=log,
                stderr=log,
            )
        whole, self.url = self.url, self.url.rpartition("/")[0] + "/mysql"
        self.wait_until_up()
        engine = create_engine(normalise_url(self.url))
        with engine.connect() as connection:
            connection.execute(text("CREATE DATABASE IF NOT EXISTS mysql_test"))
        engine.dispose()
        self.url = whole

    def stop(self, mode: str) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL if mode == "kill" else signal.SIGTERM)
        self.process.wait(60)


class Redis:
    """A Redis of a test's own, that may be stopped and started again, empty."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        if (command := shutil.which("redis-server")) is None:
            missing("there is no redis-server")
        options = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self.process = subprocess.Popen(
            [command, "--port", str(self.port), *options], stdout=subprocess.DEVNULL
        )
        self.client = redis.Redis.from_url(self.url)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with contextlib.suppress(redis.ConnectionError):
                self.client.ping()
                return
            time.sleep(0.02)

    def stop(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def running(server: DatabaseServer, last: str) -> Iterator[DatabaseServer]:
    """Started, and gone at the end of the block, stopped in the mode ``last``."""
    server.start()
    try:
        yield server
    finally:
        server.stop(last)
        shutil.rmtree(server.folder)
