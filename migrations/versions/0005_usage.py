"""Count what happens, and what has happened.

A migration never imports the models: it must mean the same when they have moved on.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")
MOMENT = sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
BYTES = sa.LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")


def table_options() -> dict[str, object]:
    dialect = op.get_bind().dialect
    if dialect.name not in ("mysql", "mariadb"):
        return {"sqlite_autoincrement": True}
    mariadb = getattr(dialect, "is_mariadb", False)
    return {
        f"{dialect.name}_charset": "utf8mb4",
        f"{dialect.name}_collate": "utf8mb4_nopad_bin" if mariadb else "utf8mb4_0900_bin",
    }


def counts() -> list[sa.Column]:
    names = ["requests", "failures", "cancelled", "cached", "prompt_tokens", "completion_tokens"]
    return [sa.Column(name, sa.BigInteger, nullable=False) for name in names]


def upgrade() -> None:
    options = table_options()
    op.create_table(
        "usage_deltas",
        sa.Column("id", ID, primary_key=True),
        sa.Column("owner_id", sa.String(64), nullable=False),
        sa.Column("user_id", sa.String(200)),
        sa.Column("model_name", sa.String(200), nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        *counts(),
        sa.Column("duration_ms", sa.Integer),
        **options,
    )
    sums = op.create_table(
        "usage_sums",
        sa.Column("owner_id", sa.String(64), primary_key=True),
        sa.Column("kind", sa.String(10), primary_key=True),
        sa.Column("hour", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("name", sa.String(200), primary_key=True),
        *counts(),
        sa.Column("latencies", BYTES, nullable=False),
        **options | {"sqlite_autoincrement": False, "sqlite_with_rowid": False},
    )
    lock = {"owner_id": "", "kind": "lock", "hour": 0, "name": "", "latencies": b""}
    lock |= {column.name: 0 for column in counts()}
    op.bulk_insert(sums, [lock])
    # What has happened is noted like what happens: the service adds it up once it runs.
    op.execute(
        "INSERT INTO usage_deltas (owner_id, user_id, model_name, created_at, requests, failures,"
        " cancelled, cached, prompt_tokens, completion_tokens, duration_ms)"
        " SELECT owner_id, user_id, model_name, created_at, 1,"
        " CASE WHEN status IN ('failed', 'incomplete') THEN 1 ELSE 0 END,"
        " CASE WHEN status = 'cancelled' THEN 1 ELSE 0 END,"
        " CASE WHEN source_id IS NULL THEN 0 ELSE 1 END,"
        " prompt_tokens, completion_tokens, duration_ms"
        " FROM generation_records WHERE status NOT IN ('queued', 'in_progress') ORDER BY id"
    )


def downgrade() -> None:
    op.drop_table("usage_sums")
    op.drop_table("usage_deltas")
