"""Let the search index on SQLite keep more small parts before it merges them all at once.

At FTS5's own 16 a commit that adds one to some small parts beside a few large ones, as an import
leaves them, would merge those large ones within that commit: for a second or more nobody writes.
Merging in steps, which goes on beside, comes before there are so many.
"""

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

FTS5_DEFAULT = 16


def upgrade() -> None:
    set_parts(500)


def downgrade() -> None:
    set_parts(FTS5_DEFAULT)


def set_parts(count: int) -> None:
    if op.get_bind().dialect.name == "sqlite":
        for index in ("record_search", "title_search"):
            op.execute(f"INSERT INTO {index} ({index}, rank) VALUES ('crisismerge', {count})")
