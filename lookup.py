"""Queries of one row that requests ask again and again.

To run a statement takes SQLAlchemy three times as long as SQLite takes for the answer. So it
compiles the statement once, and the driver runs it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Dialect, Select
from sqlalchemy.orm import Session


class Prepared(NamedTuple):
    """A statement for one kind of database; ``converted`` are the columns that are not kept as
    they are shown."""

    sql: str
    arguments: Callable[[dict[str, Any]], Any]
    converted: Sequence[tuple[int, Callable[[Any], Any]]]

    def shown(self, found: Sequence[Any] | None) -> list[Any] | None:
        """A row as SQLAlchemy would return it."""
        if found is None:
            return None
        row = list(found)
        for place, convert in self.converted:
            row[place] = convert(row[place])
        return row


class Lookup:
    """A statement that finds one row."""

    def __init__(self, statement: Select[Any]) -> None:
        self.statement = statement
        self.prepared: dict[str, Prepared] = {}

    def row(self, session: Session, **given: Any) -> list[Any] | None:
        """The row that the statement finds, as SQLAlchemy would return it."""
        connection = session.connection()
        dialect = connection.dialect
        prepared = self.prepared_for(dialect)
        cursor = connection.connection.cursor()
        try:
            cursor.execute(prepared.sql, prepared.arguments(given))
            return prepared.shown(cursor.fetchone())
        except dialect.loaded_dbapi.Error:
            # Once more: SQLAlchemy tells of a lost connection or a damaged file as everywhere.
            found = session.execute(self.statement, given).first()
            return None if found is None else list(found)
        finally:
            cursor.close()

    def prepared_for(self, dialect: Dialect) -> Prepared:
        if dialect.name not in self.prepared:
            self.prepared[dialect.name] = self.prepare(dialect)
        return self.prepared[dialect.name]

    def prepare(self, dialect: Dialect) -> Prepared:
        compiled: Any = self.statement.compile(dialect=dialect)
        values, order = compiled.params, compiled.positiontup
        binding = {
            name: process
            for name, parameter in compiled.binds.items()
            if (process := parameter.type.dialect_impl(dialect).bind_processor(dialect))
        }

        def arguments(given: dict[str, Any]) -> Any:
            found = values | given
            for name, process in binding.items():
                found[name] = process(found[name])
            return found if order is None else tuple([found[name] for name in order])

        converted = [
            (place, process)
            for place, column in enumerate(self.statement.selected_columns)
            if (process := column.type.dialect_impl(dialect).result_processor(dialect, None))
        ]
        return Prepared(str(compiled), arguments, converted)
