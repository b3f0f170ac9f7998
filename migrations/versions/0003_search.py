"""Create the search index, and index what is there.

It holds what ``words`` makes: should that ever change, a later migration makes the index anew.
"""

from collections.abc import Callable

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.orm import Session

from repositories import search
from words import record_words, title_words

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

RECORD_COLUMNS = (
    "prompt",
    "completion",
    "owner_id",
    "user_id",
    "status",
    "model_name",
    "conversation_id",
)
TITLE_COLUMNS = ("title", "owner_id")
BATCH = 500


def upgrade() -> None:
    sqlite = op.get_bind().dialect.name == "sqlite"
    make = make_fts5 if sqlite else make_table
    make("record_search", "generation_records", "record_id", RECORD_COLUMNS)
    make("title_search", "conversations", "conversation_id", TITLE_COLUMNS)
    fill(search.RECORDS, "generation_records", RECORD_COLUMNS, record_words)
    fill(search.TITLES, "conversations", TITLE_COLUMNS, title_words)


def make_fts5(index: str, table: str, _: str, columns: tuple[str, ...]) -> None:
    """The index holds no text: what leaves it has to say once more which words it had."""
    op.execute(
        f"CREATE VIRTUAL TABLE {index} USING fts5("
        "words, content='', tokenize=\"ascii tokenchars '_'\")"
    )
    function = "record_words" if table == "generation_records" else "title_words"
    old = ", ".join(f"old.{column}" for column in columns)
    for name, moment in (
        ("deleted", "DELETE"),
        ("changed", f"UPDATE OF {', '.join(columns)}"),
    ):
        take_out = f"({index}, rowid, words) VALUES ('delete', old.id, {function}({old}))"
        op.execute(
            f"CREATE TRIGGER {index}_{name} AFTER {moment} ON {table}"
            f" WHEN EXISTS (SELECT 1 FROM {index}_docsize WHERE id = old.id)"
            f" BEGIN INSERT INTO {index} {take_out}; END"
        )


def make_table(index: str, table: str, key: str, _: tuple[str, ...]) -> None:
    dialect = op.get_bind().dialect
    words = postgresql.TSVECTOR() if dialect.name == "postgresql" else mysql.LONGTEXT()
    options = {}
    if dialect.name != "postgresql":
        options = {f"{dialect.name}_charset": "ascii", f"{dialect.name}_collate": "ascii_bin"}
    op.create_table(
        index,
        sa.Column(
            key,
            sa.BigInteger,
            sa.ForeignKey(f"{table}.id", ondelete="CASCADE"),
            primary_key=True,
            autoincrement=False,
        ),
        sa.Column("words", words, nullable=False),
        **options,
    )
    if dialect.name == "postgresql":
        op.create_index(f"ix_{index}", index, ["words"], postgresql_using="gin")
    else:
        fulltext = {f"{dialect.name}_prefix": "FULLTEXT"}
        op.create_index(f"ix_{index}", index, ["words"], **fulltext)


def fill(
    index: search.Index, table: str, columns: tuple[str, ...], make: Callable[..., str]
) -> None:
    session = Session(op.get_bind())
    found = sa.table(table, sa.column("id"), *map(sa.column, columns))
    rows = sa.select(found).order_by(found.c.id).limit(BATCH)
    if index is search.RECORDS:
        has_text = sa.or_(found.c.prompt != "", found.c.completion != "")
        rows = rows.where(found.c.status != "in_progress", has_text)
    last = 0
    while batch := session.execute(rows.where(found.c.id > last)).all():
        search.put(session, index, [(row[0], make(*row[1:])) for row in batch])
        last = batch[-1][0]


def downgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        for index in ("record_search", "title_search"):
            for moment in ("deleted", "changed"):
                op.execute(f"DROP TRIGGER {index}_{moment}")
    op.drop_table("record_search")
    op.drop_table("title_search")
