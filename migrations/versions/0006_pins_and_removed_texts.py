"""Let records be pinned, and lose their text while they stay.

A migration never imports the models: it must mean the same when they have moved on.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

RECORDS = "generation_records"
MOMENT = sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")


def upgrade() -> None:
    op.add_column(
        RECORDS, sa.Column("pinned", sa.Boolean, nullable=False, server_default=sa.false())
    )
    op.add_column(RECORDS, sa.Column("text_removed_at", MOMENT))


def downgrade() -> None:
    op.drop_column(RECORDS, "pinned")
    op.drop_column(RECORDS, "text_removed_at")
