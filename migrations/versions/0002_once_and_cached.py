"""Let a record be asked for once, answered from another, and run again.

A migration never imports the models: it must mean the same when they have moved on.
"""

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

RECORDS = "generation_records"
COLUMNS = {
    "idempotency_key": sa.String(255),
    "idempotency_fingerprint": sa.String(32),
    "cache_key": sa.String(32),
    "flight_key": sa.String(32),
}
INDEXES = {
    "ix_records_idempotency": (["idempotency_key", "owner_id"], True),
    "ix_records_cache": (["cache_key", "id"], False),
    "ix_records_flight": (["flight_key"], True),
    "ix_records_source": (["source_id"], False),
}


def upgrade() -> None:
    for name, column_type in COLUMNS.items():
        op.add_column(RECORDS, sa.Column(name, column_type))
    op.add_column(RECORDS, sa.Column("attempts", sa.Integer, nullable=False, server_default="1"))
    add_source()
    for name, (columns, unique) in INDEXES.items():
        partial_index(name, columns, unique)
    options = {}
    if op.get_bind().dialect.name in ("mysql", "mariadb"):
        options = {f"{op.get_bind().dialect.name}_charset": "utf8mb4"}
    table = op.create_table(
        "secrets",
        sa.Column("name", sa.String(50), primary_key=True),
        sa.Column("value", sa.String(64), nullable=False),
        **options,
    )
    op.bulk_insert(table, [{"name": "cache", "value": secrets.token_hex(32)}])


def add_source() -> None:
    """A column with a foreign key: on SQLite in one statement, for it alters no constraints."""
    if op.get_bind().dialect.name == "sqlite":
        op.execute(f"ALTER TABLE {RECORDS} ADD COLUMN source_id INTEGER REFERENCES {RECORDS} (id)")
        return
    op.add_column(RECORDS, sa.Column("source_id", sa.BigInteger))
    op.create_foreign_key("fk_records_source", RECORDS, RECORDS, ["source_id"], ["id"])


def partial_index(name: str, columns: list[str], unique: bool) -> None:
    """An index of the rows that have a value in its first column, where the database can."""
    has_value = sa.text(f"{columns[0]} IS NOT NULL")
    op.create_index(
        name,
        RECORDS,
        columns,
        unique=unique,
        sqlite_where=has_value,
        postgresql_where=has_value,
    )


def downgrade() -> None:
    if op.get_bind().dialect.name != "sqlite":
        op.drop_constraint("fk_records_source", RECORDS, type_="foreignkey")
    for name in INDEXES:
        op.drop_index(name, RECORDS)
    for name in ("source_id", "attempts", *COLUMNS):
        op.drop_column(RECORDS, name)
    op.drop_table("secrets")
