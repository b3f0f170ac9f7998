"""Find a time's records by their ids, without an index of every record; drop what that replaces.

A migration never imports the models: it must mean the same when they have moved on.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

RECORDS = "generation_records"
MOMENT = sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
PARTIAL = {
    "ix_records_user": (["owner_id", "user_id", "id"], "user_id IS NOT NULL"),
    "ix_records_status": (["owner_id", "status", "id"], "status <> 'completed'"),
}


def upgrade() -> None:
    dialect = op.get_bind().dialect.name
    options = {f"{dialect}_charset": "utf8mb4"} if dialect in ("mysql", "mariadb") else {}
    op.create_table(
        "record_blocks",
        sa.Column("block", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("earliest", MOMENT, nullable=False),
        sa.Column("latest", MOMENT, nullable=False),
        **options,
    )
    op.execute("DELETE FROM record_blocks")  # on MySQL an earlier run may have been cut off below
    op.execute(
        "INSERT INTO record_blocks (block, earliest, latest)"
        " SELECT id >> 12, MIN(created_at), MAX(created_at)"
        f" FROM {RECORDS} GROUP BY id >> 12"
    )
    op.drop_index("ix_records_created", RECORDS)
    for name, (columns, where) in PARTIAL.items():
        op.drop_index(name, RECORDS)
        condition = sa.text(where)
        op.create_index(name, RECORDS, columns, sqlite_where=condition, postgresql_where=condition)


def downgrade() -> None:
    for name, (columns, _) in PARTIAL.items():
        op.drop_index(name, RECORDS)
        op.create_index(name, RECORDS, columns)
    op.create_index("ix_records_created", RECORDS, ["owner_id", "created_at", "id"])
    op.drop_table("record_blocks")
