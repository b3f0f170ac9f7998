"""Many rows into one table: bound by one process, inserted by another.

To bind a row, to bring each value through its column's type, is most of what SQLAlchemy does for
an insert, and needs no database. What is bound goes to the driver as it is.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import URL, Connection, Dialect, Insert, Table, insert
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError
from sqlalchemy.orm import Session

Bound = tuple[Any, ...]

# What MySQL's driver does not tell from trouble of the database's own: a packet that is too large
# (max_allowed_packet), and a check that failed, on MariaDB and on MySQL.
MYSQL_REFUSALS = {1153, 4025, 3819}


class BulkInsert:
    """Inserts certain columns of a table, by one driver ("postgresql+psycopg")."""

    def __init__(self, table: Table, names: Collection[str], drivername: str) -> None:
        dialect = positional(drivername)
        columns = [column for column in table.c if column.name in names]  # in the statement's order
        self.sql = insertion_sql(insert(table), drivername, [column.name for column in columns])
        self.processors = [
            (column.name, column.type.dialect_impl(dialect).bind_processor(dialect))
            for column in columns
        ]

    def bind(self, row: Mapping[str, Any]) -> Bound:
        return tuple(
            [
                row[name] if process is None else process(row[name])
                for name, process in self.processors
            ]
        )


def insertion_sql(insertion: Insert, drivername: str, names: Sequence[str]) -> str:
    """How certain columns are inserted, as ``run`` takes it.

    PostgreSQL copies: as one stream, rows take half the time that they take as statements.
    """
    if drivername.startswith("postgresql"):
        return f"COPY {insertion.table.description} ({', '.join(names)}) FROM STDIN"
    return str(insertion.compile(dialect=positional(drivername), column_keys=[*names]))


def run(session: Session, sql: str, rows: Sequence[Bound]) -> None:
    """Insert what was bound, with the SQL it was bound for. Raises DBAPIError."""
    if not rows:
        return
    connection = session.connection()
    if connection.dialect.name == "postgresql":
        copy(connection, sql, rows)
    else:
        connection.exec_driver_sql(sql, list(rows))


def copy(connection: Connection, sql: str, rows: Sequence[Bound]) -> None:
    driver: Any = connection.connection.driver_connection
    errors: Any = connection.dialect.loaded_dbapi
    try:
        with driver.cursor() as cursor, cursor.copy(sql) as stream:
            for row in rows:
                stream.write_row(row)
    except errors.Error as error:
        raise DBAPIError.instance(
            sql, None, error, errors.Error, hide_parameters=True, dialect=connection.dialect
        ) from error


def positional(drivername: str) -> Dialect:
    kind: Any = URL.create(drivername).get_dialect()
    dialect: Dialect = kind(paramstyle="qmark" if kind.name == "sqlite" else "format")
    return dialect


def refuses_rows(error: DBAPIError) -> bool:
    """Whether rows are to blame, and not a full disk, a lock or a lost connection."""
    if isinstance(error, DataError | IntegrityError):
        return True
    return error.orig is not None and not MYSQL_REFUSALS.isdisjoint(error.orig.args)
