"""Tell the first part of a long word, in the search index on MySQL, from a shorter word.

The words of a row are followed by its marks, which begin with "_", and those by the parts. A part
gets an odd number of underscores, which no word has. To do so once more changes nothing.
"""

from collections.abc import Callable

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

INDEXES = {"record_search": "record_id", "title_search": "conversation_id"}
LONGEST_PART = 80
BATCH = 500


def upgrade() -> None:
    change_parts(told_apart)


def downgrade() -> None:
    change_parts(cut)


def told_apart(part: str) -> str:
    return part if part.count("_") % 2 else f"{part}_"


def cut(part: str) -> str:
    return part[:LONGEST_PART]


def change_parts(change: Callable[[str], str]) -> None:
    if op.get_bind().dialect.name in ("mysql", "mariadb"):
        for name, key in INDEXES.items():
            change_table(sa.table(name, sa.column(key), sa.column("words")), key, change)


def change_table(table: sa.TableClause, key: str, change: Callable[[str], str]) -> None:
    bind, key_column = op.get_bind(), table.c[key]
    last_word = sa.func.substring_index(sa.func.rtrim(table.c.words), " ", -1)
    rows = sa.select(key_column, table.c.words).order_by(key_column).limit(BATCH)
    rows = rows.where(sa.func.left(last_word, 1) != "_")
    update = table.update().where(key_column == sa.bindparam("of"))
    update = update.values(words=sa.bindparam("new"))
    last = 0
    while batch := bind.execute(rows.where(key_column > last)).all():
        bind.execute(update, [{"of": of, "new": changed(words, change)} for of, words in batch])
        last = batch[-1][0]


def changed(words: str, change: Callable[[str], str]) -> str:
    found = words.split()
    marks = [place for place, word in enumerate(found) if word.startswith("_")]
    parts = sorted(map(change, found[marks[-1] + 1 :]))
    return f" {' '.join([*found[: marks[-1] + 1], *parts])} "
