"""Migrated databases for tests, each used by one after the other: to make one takes seconds."""

import functools
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, create_engine, text

from database import Database
from tests.databases import fresh_database

# What a test may have changed of a schema: a database of another one is not used again.
POSTGRES_SCHEMA = """
SELECT concat_ws(' ', relname, relkind, reloptions) FROM pg_class
WHERE relnamespace = 'public'::regnamespace
UNION ALL SELECT concat_ws(' ', relname, attname, atttypid, attnotnull) FROM pg_attribute
JOIN pg_class ON pg_class.oid = attrelid AND relnamespace = 'public'::regnamespace
UNION ALL SELECT concat_ws(' ', relname, indisvalid) FROM pg_index
JOIN pg_class ON pg_class.oid = indexrelid AND relnamespace = 'public'::regnamespace
UNION ALL SELECT concat_ws(' ', tgname, tgenabled) FROM pg_trigger
UNION ALL SELECT concat_ws(' ', proname, prosrc) FROM pg_proc
WHERE pronamespace = 'public'::regnamespace
UNION ALL SELECT pg_get_constraintdef(oid) FROM pg_constraint
WHERE connamespace = 'public'::regnamespace
UNION ALL SELECT setconfig::text FROM pg_db_role_setting
JOIN pg_database ON pg_database.oid = setdatabase WHERE datname = current_database()
ORDER BY 1
"""
POSTGRES_OTHERS = """
SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
"""
MYSQL_OTHERS = """
SELECT id FROM information_schema.processlist WHERE db = database() AND id <> connection_id()
"""


@contextmanager
def prepared_database(kind: str, folder: Path) -> Iterator[str]:
    """The URL of a database as the first start of a service leaves it."""
    if kind == "sqlite":
        shutil.copy(migrated_file(), folder / "records.db")
        yield f"sqlite:///{folder / 'records.db'}"
        return
    kept = SPARE.setdefault(kind, [])
    used = kept.pop() if kept else KINDS[kind]()
    try:
        yield used.url
    finally:
        if used.is_clean_again():
            kept.append(used)
        else:
            used.close()


def close_spare() -> None:
    """Remove what was kept for the next test."""
    while SPARE:
        for used in SPARE.popitem()[1]:
            used.close()


@functools.cache
def migrated_file() -> Path:
    file = Path(tempfile.mkdtemp(prefix="prepared-")) / "records.db"
    database = Database(f"sqlite:///{file}")
    database.open()
    database.close()
    return file


class Prepared:
    """A migrated database on a server."""

    kind: str

    def __init__(self) -> None:
        self.held = ExitStack()
        self.url = self.held.enter_context(fresh_database(self.kind, Path()))
        database = Database(self.url)
        database.open()
        database.close()
        self.engine = create_engine(self.url)
        with self.engine.connect() as connection:
            self.schema = self.schema_of(connection)
            self.tables = self.tables_of(connection)
            self.rows = {name: rows_of(connection, name) for name in self.tables}

    def is_clean_again(self) -> bool:
        """Whether it is as it was, once those who use it yet are cut off and its rows are gone."""
        with self.engine.begin() as connection:
            self.cut_others_off(connection)
            if self.schema_of(connection) != self.schema:
                return False
            self.empty(connection)
            for name, rows in self.rows.items():
                if rows:
                    values = ", ".join(["%s"] * len(rows[0]))
                    connection.exec_driver_sql(f"INSERT INTO {name} VALUES ({values})", rows)
        self.engine.dispose()
        return True

    def close(self) -> None:
        self.engine.dispose()
        self.held.close()

    def tables_of(self, connection: Connection) -> Sequence[str]:
        raise NotImplementedError

    def schema_of(self, connection: Connection) -> Sequence[Any]:
        raise NotImplementedError

    def cut_others_off(self, connection: Connection) -> None:
        raise NotImplementedError

    def empty(self, connection: Connection) -> None:
        raise NotImplementedError


class PreparedPostgres(Prepared):
    kind = "postgresql"

    def tables_of(self, connection: Connection) -> Sequence[str]:
        asked = "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
        return connection.scalars(text(asked)).all()

    def schema_of(self, connection: Connection) -> Sequence[Any]:
        return connection.scalars(text(POSTGRES_SCHEMA)).all()

    def cut_others_off(self, connection: Connection) -> None:
        connection.execute(text(POSTGRES_OTHERS))

    def empty(self, connection: Connection) -> None:
        connection.execute(text(f"TRUNCATE {', '.join(self.tables)} RESTART IDENTITY"))


class PreparedMySQL(Prepared):
    kind = "mysql"

    def tables_of(self, connection: Connection) -> Sequence[str]:
        return connection.scalars(text("SHOW TABLES")).all()

    def schema_of(self, connection: Connection) -> Sequence[Any]:
        made = [
            connection.execute(text(f"SHOW CREATE TABLE {name}")).one()[1]
            for name in self.tables_of(connection)
        ]
        return [re.sub(r" AUTO_INCREMENT=\d+", "", statement) for statement in made]

    def cut_others_off(self, connection: Connection) -> None:
        for other in connection.scalars(text(MYSQL_OTHERS)).all():
            connection.execute(text(f"KILL {other}"))

    def empty(self, connection: Connection) -> None:
        connection.execute(text("SET foreign_key_checks = 0"))
        for name in self.tables:
            connection.execute(text(f"DELETE FROM {name}"))
            connection.execute(text(f"ALTER TABLE {name} AUTO_INCREMENT = 1"))


KINDS: dict[str, type[Prepared]] = {"postgresql": PreparedPostgres, "mysql": PreparedMySQL}
SPARE: dict[str, list[Prepared]] = {}


def rows_of(connection: Connection, table: str) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in connection.execute(text(f"SELECT * FROM {table}"))]
