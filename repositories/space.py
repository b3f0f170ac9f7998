"""What a SQLite file has of free pages, and giving them back. Other databases see to it alone."""

from sqlalchemy import text
from sqlalchemy.orm import Session


def free_pages(session: Session) -> int:
    """Pages that can be given back: none of a file that was made before this could be done."""
    if session.get_bind().dialect.name != "sqlite":
        return 0
    incremental = session.scalar(text("PRAGMA auto_vacuum")) == 2
    return int(session.scalar(text("PRAGMA freelist_count")) or 0) if incremental else 0


def give_back(session: Session, pages: int) -> None:
    """Give some pages back. The pragma frees one with each row that the driver asks for."""
    cursor = session.connection().connection.cursor()
    cursor.execute(f"PRAGMA incremental_vacuum({pages:d})")
    cursor.fetchall()
    cursor.close()


def merge(session: Session, index: str, pages: int) -> bool:
    """Merge a search index's segments, so that words that were taken out are in none of them.

    So many pages of it; negative begins a merge of all segments, positive goes on with one.
    Whether there was something to do.
    """
    if session.get_bind().dialect.name != "sqlite":
        return False
    changes = text("SELECT total_changes()")
    before = session.scalar(changes) or 0
    statement = f"INSERT INTO {index} ({index}, rank) VALUES ('merge', :pages)"  # noqa: S608
    session.execute(text(statement), {"pages": pages})
    return (session.scalar(changes) or 0) - before >= 2
