"""Create conversations, generation_records and leases.

A migration never imports the models: it must mean the same when they have moved on.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")
LONG_TEXT = sa.Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")
MOMENT = sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")


def table_options() -> dict[str, object]:
    """On MySQL, texts compare byte by byte; plain utf8mb4_bin would ignore spaces at the end."""
    dialect = op.get_bind().dialect
    mariadb = getattr(dialect, "is_mariadb", False)
    if dialect.name not in ("mysql", "mariadb"):
        return {"sqlite_autoincrement": True}
    return {
        f"{dialect.name}_charset": "utf8mb4",
        f"{dialect.name}_collate": "utf8mb4_nopad_bin" if mariadb else "utf8mb4_0900_bin",
    }


def upgrade() -> None:
    options = table_options()
    op.create_table(
        "leases",
        sa.Column("id", ID, primary_key=True),
        sa.Column("beat", sa.BigInteger, nullable=False),
        sa.Column("machine", sa.String(100), nullable=False),
        sa.Column("process", sa.String(100), nullable=False),
        **options,
    )
    op.create_table(
        "conversations",
        sa.Column("id", ID, primary_key=True),
        sa.Column("owner_id", sa.String(64), nullable=False),
        sa.Column("title", sa.String(200), nullable=False),
        sa.Column("title_pending", sa.Boolean),
        sa.Column("initial_prompt", LONG_TEXT),
        sa.Column("model_type", sa.String(200), nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("updated_at", MOMENT, nullable=False),
        **options,
    )
    op.create_index("ix_conversations_owner", "conversations", ["owner_id", "id"])
    partial_index("ix_conversations_untitled", "conversations", ["title_pending"])
    op.create_table(
        "generation_records",
        sa.Column("id", ID, primary_key=True),
        sa.Column("owner_id", sa.String(64), nullable=False),
        sa.Column("user_id", sa.String(200)),
        sa.Column("conversation_id", ID, sa.ForeignKey("conversations.id", ondelete="CASCADE")),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("finish_reason", sa.String(16)),
        sa.Column("prompt", LONG_TEXT, nullable=False),
        sa.Column("completion", LONG_TEXT, nullable=False),
        sa.Column("model_name", sa.String(200), nullable=False),
        sa.Column("model_fingerprint", sa.String(16), nullable=False),
        sa.Column("dtype", sa.String(16), nullable=False),
        sa.Column("parameters", sa.JSON, nullable=False),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("prompt_tokens", sa.Integer, nullable=False),
        sa.Column("completion_tokens", sa.Integer, nullable=False),
        sa.Column("duration_ms", sa.Integer),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("updated_at", MOMENT, nullable=False),
        sa.Column("cancel_requested", sa.Boolean),
        sa.Column("lease_id", sa.BigInteger),
        **options,
    )
    for name, column in (
        ("ix_records_user", "user_id"),
        ("ix_records_status", "status"),
        ("ix_records_model", "model_name"),
        ("ix_records_created", "created_at"),
    ):
        op.create_index(name, "generation_records", ["owner_id", column, "id"])
    op.create_index("ix_records_owner", "generation_records", ["owner_id", "id"])
    partial_index("ix_records_conversation", "generation_records", ["conversation_id", "id"])
    partial_index("ix_records_open", "generation_records", ["lease_id"])


def partial_index(name: str, table: str, columns: list[str]) -> None:
    """An index of the rows that have a value in its first column, where the database can."""
    has_value = sa.text(f"{columns[0]} IS NOT NULL")
    op.create_index(name, table, columns, sqlite_where=has_value, postgresql_where=has_value)


def downgrade() -> None:
    op.drop_table("generation_records")
    op.drop_table("conversations")
    op.drop_table("leases")
