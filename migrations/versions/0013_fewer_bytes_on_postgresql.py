"""Keep hashes and counts in fewer bytes on PostgreSQL, and fill the pages of ordered indexes.

The table is written anew, and its indexes with it.
"""

from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

RECORDS, SUMS, NOTES = "generation_records", "usage_sums", "usage_deltas"
HASHES = ("idempotency_fingerprint", "cache_key", "flight_key")
COUNTS = ("requests", "failures", "cancelled", "cached")
ORDERED = ("generation_records_pkey", "ix_records_owner", "ix_records_user")


def upgrade() -> None:
    if op.get_bind().dialect.name != "postgresql":
        return
    for index in ORDERED:
        op.execute(f"ALTER INDEX {index} SET (fillfactor = 100)")
    change(RECORDS, HASHES, "UUID", "encode({}, 'hex')::uuid")
    for table in (SUMS, NOTES):
        change(table, COUNTS, "INTEGER", "{}::integer")


def downgrade() -> None:
    if op.get_bind().dialect.name != "postgresql":
        return
    for index in ORDERED:
        op.execute(f"ALTER INDEX {index} RESET (fillfactor)")
    change(RECORDS, HASHES, "BYTEA", "decode(replace({}::text, '-', ''), 'hex')")
    for table in (SUMS, NOTES):
        change(table, COUNTS, "BIGINT", "{}::bigint")


def change(table: str, columns: tuple[str, ...], new: str, value: str) -> None:
    """All in one statement, which writes the table once."""
    changes = [f"ALTER {name} TYPE {new} USING {value.format(name)}" for name in columns]
    op.execute(f"ALTER TABLE {table} {', '.join(changes)}")
