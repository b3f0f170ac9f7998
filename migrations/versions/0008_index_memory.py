"""Let the search index on SQLite gather the words of a large transaction in memory.

At FTS5's own 1 MB an import's batch is written as several small parts that are merged again.
Small transactions never come near it.
"""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

FTS5_DEFAULT = 1 << 20


def upgrade() -> None:
    set_memory(16 << 20)


def downgrade() -> None:
    set_memory(FTS5_DEFAULT)


def set_memory(size: int) -> None:
    if op.get_bind().dialect.name == "sqlite":
        for index in ("record_search", "title_search"):
            op.execute(f"INSERT INTO {index} ({index}, rank) VALUES ('hashsize', {size})")
