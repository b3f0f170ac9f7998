"""Backups of PostgreSQL and MySQL or MariaDB by the programs that come with them.

A password goes into the program's environment, never on its command line.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import BinaryIO

from sqlalchemy import URL

from errors import CommandError

LAST_LINE = re.compile(r"[^\n]+\Z")
# Of a load that fails, no more than where: what else is said may quote rows.
LOADING = re.compile(r'ERROR \d+ (\(\w+\) )?at line \d+|COPY failed for table "\w+"')
DUMP_END = b"-- Dump completed"  # mysqldump writes it when all is written


def dump(url: URL, target: Path) -> None:
    """Raises CommandError unless the dump is whole."""
    if url.get_backend_name() == "postgresql":
        run(url, "pg_dump", "--format=custom", "--no-owner", f"--file={target}", location(url))
        read_through(url, target)
        return
    run(
        url,
        program("mysqldump", "mariadb-dump"),
        *mysql_options(url),
        "--single-transaction",
        "--quick",
        "--no-tablespaces",
        f"--result-file={target}",
        str(url.database),
    )
    expect_end(target)


def load(url: URL, source: Path) -> None:
    """Fill an empty database from a dump. Raises CommandError.

    MySQL, which has no transaction for tables, keeps those that were made until then.
    """
    if url.get_backend_name() == "postgresql":
        read_through(url, source)
        run(
            url,
            "pg_restore",
            "--no-owner",
            "--single-transaction",
            "--exit-on-error",
            f"--dbname={location(url)}",
            str(source),
            said=LOADING,
        )
        return
    expect_end(source)
    with source.open("rb") as lines:
        client = program("mysql", "mariadb")
        run(url, client, *mysql_options(url), str(url.database), stdin=lines, said=LOADING)


def read_through(url: URL, dumped: Path) -> None:
    """Unpack all of it to nowhere."""
    run(url, "pg_restore", f"--file={os.devnull}", str(dumped))


def expect_end(dumped: Path) -> None:
    with dumped.open("rb") as lines:
        lines.seek(-min(dumped.stat().st_size, 4096), os.SEEK_END)
        if DUMP_END not in lines.read():
            raise CommandError(f"{dumped} is no whole backup of a MySQL database")


def location(url: URL) -> str:
    """As PostgreSQL's programs take it."""
    return url.set(drivername="postgresql", password=None).render_as_string()


def mysql_options(url: URL) -> list[str]:
    options = ["--default-character-set=utf8mb4"]
    given = {"host": url.host, "port": url.port, "user": url.username}
    given["socket"] = str(url.query["unix_socket"]) if "unix_socket" in url.query else None
    return options + [f"--{name}={value}" for name, value in given.items() if value is not None]


def program(*names: str) -> str:
    """The first of a program's names that is on the PATH. Raises CommandError."""
    for name in names:
        if shutil.which(name):
            return name
    raise CommandError(f"{names[0]} is not on the PATH: install the database's client programs")


def run(
    url: URL,
    name: str,
    *arguments: str,
    stdin: BinaryIO | None = None,
    said: re.Pattern[str] = LAST_LINE,
) -> None:
    """Raises CommandError with what a failed program ``said``, of all its complaints."""
    password = url.password or ""
    done = subprocess.run(  # noqa: S603 - the operator's own settings
        [program(name), *arguments],
        env=os.environ | {"PGPASSWORD": password, "MYSQL_PWD": password},
        stdin=stdin or subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        found = said.search(done.stderr.strip())
        raise CommandError(
            f"{name} failed: {found[0] if found else f'exit status {done.returncode}'}"
        )
