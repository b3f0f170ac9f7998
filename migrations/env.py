"""Run migrations: on the connection that the service gives, or by hand on DATABASE_URL's.

MySQL commits each change of a table at once. A migration that was cut off there is begun again,
and what it has done already is left as it is; rows go in with the version, at a migration's end.
"""

from typing import Any

from alembic import context
from alembic.ddl.mysql import MariaDBImpl, MySQLImpl
from sqlalchemy import Connection, inspect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.schema import AddConstraint, CreateTable

from database import Database
from models import Base
from settings import load_settings

DUPLICATE_COLUMN, DUPLICATE_INDEX, NOTHING_TO_DROP = 1060, 1061, 1091


class RepeatableMySQL(MySQLImpl):
    """Registered by its dialect's name, instead of Alembic's own."""

    __dialect__ = "mysql"

    def _exec(self, construct: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return super()._exec(construct, *arguments, **options)
        except DBAPIError as error:
            if not is_done(self.connection, construct, error.orig.args[0]):
                raise


class RepeatableMariaDB(RepeatableMySQL, MariaDBImpl):
    __dialect__ = "mariadb"


def is_done(connection: Connection, step: Any, refusal: int) -> bool:
    """Whether a step was refused because an earlier run has taken it.

    A table with the same columns is ours; another program's table of that name must not be used.
    """
    if isinstance(step, CreateTable):
        table = step.element
        there = inspect(connection)
        return there.has_table(table.name) and [
            column["name"] for column in there.get_columns(table.name)
        ] == [column.name for column in table.columns]
    if isinstance(step, AddConstraint):  # a foreign key; the refusal's number differs
        keys = inspect(connection).get_foreign_keys(step.element.table.name)
        return step.element.name in [key["name"] for key in keys]
    return refusal in (DUPLICATE_COLUMN, DUPLICATE_INDEX, NOTHING_TO_DROP)


def run(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()


def run_by_hand() -> None:
    settings = load_settings()
    database = Database(settings.database_url)
    with database.migrating() as connection:
        run(connection)
    database.close()


given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    run_by_hand()
