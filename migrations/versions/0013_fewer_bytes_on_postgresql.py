"""Keep hashes and counts in fewer bytes on PostgreSQL, and fill the pages of ordered indexes.

The table is written anew, and its indexes with it.

The service of this version keeps a sum's milliseconds in 16 bits where they fit, after a zero byte,
on every database. Going down, they are written in the 32 bits that earlier versions read.
"""

import struct

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

RECORDS, SUMS, NOTES = "generation_records", "usage_sums", "usage_deltas"
HASHES = ("idempotency_fingerprint", "cache_key", "flight_key")
COUNTS = ("requests", "failures", "cancelled", "cached")
SUM = ("owner_id", "kind", "hour", "name")
BATCH = 1000
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
    widen_milliseconds()
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


def widen_milliseconds() -> None:
    bind = op.get_bind()
    sums = sa.table(SUMS, *map(sa.column, SUM), sa.column("latencies", sa.LargeBinary))
    key = [sums.c[name] for name in SUM]
    narrow = sa.select(*sums.c).where(sa.func.length(sums.c.latencies) % 2 == 1)
    update = sums.update().where(*[part == sa.bindparam(f"of_{part.name}") for part in key])
    update = update.values(latencies=sa.bindparam("wide"))
    while rows := bind.execute(narrow.order_by(*key).limit(BATCH)).all():
        wider = [{"wide": widened(row.latencies)} for row in rows]
        of = [{f"of_{name}": getattr(row, name) for name in SUM} for row in rows]
        bind.execute(update, [one | new for one, new in zip(of, wider, strict=True)])


def widened(latencies: bytes) -> bytes:
    count = len(latencies) // 2
    return struct.pack(f"<{count}I", *struct.unpack(f"<{count}H", latencies[1:]))
