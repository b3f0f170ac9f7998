"""Find a model's records by blocks of ids, without an index of every record.

A migration never imports the models: it must mean the same when they have moved on.
"""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

RECORDS = "generation_records"


def table_options() -> dict[str, object]:
    dialect = op.get_bind().dialect
    if dialect.name not in ("mysql", "mariadb"):
        return {"sqlite_with_rowid": False}
    mariadb = getattr(dialect, "is_mariadb", False)
    return {
        f"{dialect.name}_charset": "utf8mb4",
        f"{dialect.name}_collate": "utf8mb4_nopad_bin" if mariadb else "utf8mb4_0900_bin",
    }


def upgrade() -> None:
    op.create_table(
        "model_blocks",
        sa.Column("owner_id", sa.String(64), primary_key=True),
        sa.Column("model_name", sa.String(200), primary_key=True),
        sa.Column("block", sa.BigInteger, primary_key=True, autoincrement=False),
        **table_options(),
    )
    op.execute("DELETE FROM model_blocks")  # on MySQL an earlier run may have been cut off below
    op.execute(
        "INSERT INTO model_blocks (owner_id, model_name, block)"
        f" SELECT DISTINCT owner_id, model_name, id >> 12 FROM {RECORDS}"
    )
    op.drop_index("ix_records_model", RECORDS)


def downgrade() -> None:
    op.create_index("ix_records_model", RECORDS, ["owner_id", "model_name", "id"])
    op.drop_table("model_blocks")
