"""Run migrations: on the connection that the service gives, or by hand on DATABASE_URL's."""

from alembic import context
from sqlalchemy import Connection

from database import Database
from models import Base
from settings import load_settings


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
