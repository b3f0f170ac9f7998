"""Index the sums that hold many requests, by which the busiest users are found."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    busy = sa.text("requests >= 4")
    op.create_index(
        "ix_usage_busy",
        "usage_sums",
        ["owner_id", "kind", "hour", "requests"],
        sqlite_where=busy,
        postgresql_where=busy,
    )


def downgrade() -> None:
    op.drop_index("ix_usage_busy", "usage_sums")
