"""Many rows into one table: bound by one process, inserted by another.

To bind a row, to bring each value through its column's type, is most of what SQLAlchemy does for
an insert, and needs no database. What is bound goes to the driver as it is.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import URL, Dialect, Table, insert
from sqlalchemy.orm import Session

Bound = tuple[Any, ...]


class BulkInsert:
    """Inserts certain columns of a table, by one driver ("postgresql+psycopg")."""

    def __init__(self, table: Table, names: Collection[str], drivername: str) -> None:
        dialect = positional(drivername)
        columns = [column for column in table.c if column.name in names]  # in the statement's order
        self.sql = str(insert(table).compile(dialect=dialect, column_keys=[*names]))
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


def run(session: Session, sql: str, rows: Sequence[Bound]) -> None:
    """Insert what was bound, with the SQL it was bound for."""
    if rows:
        session.connection().exec_driver_sql(sql, list(rows))


def positional(drivername: str) -> Dialect:
    kind: Any = URL.create(drivername).get_dialect()
    dialect: Dialect = kind(paramstyle="qmark" if kind.name == "sqlite" else "format")
    return dialect
