"""The search index: which records, and which conversations by their titles, hold certain words.

What is indexed are the words that ``words`` makes, and what is asked for are such words, so each
database finds the same. How the index is kept differs:

    SQLite       FTS5 without the text; triggers take out what is deleted or changed, with the
                 words made once more from the old row
    PostgreSQL   a tsvector under a GIN index, gone with its row (foreign key)
    MySQL        the words as ASCII under a FULLTEXT index, gone with its row (foreign key);
                 InnoDB leaves out short, frequent and over-long words, so each gets a beginning,
                 and a long one its first part beside it
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import (
    ColumnClause,
    ColumnElement,
    Insert,
    Select,
    TableClause,
    bindparam,
    cast,
    column,
    delete,
    func,
    insert,
    not_,
    select,
    table,
)
from sqlalchemy.dialects.mysql import match
from sqlalchemy.dialects.postgresql import TSQUERY, TSVECTOR
from sqlalchemy.orm import Session

from words import Term

NEWEST = 4096  # ids that PostgreSQL looks through first
AUTOMERGE = 4  # parts of the index in a SQLite file that FTS5 merges by itself: its default
LONGEST_KEY = 80  # InnoDB's is 84


@dataclass(frozen=True)
class Index:
    name: str
    key: str


RECORDS = Index("record_search", "record_id")
TITLES = Index("title_search", "conversation_id")


def put(session: Session, index: Index, rows: Iterable[tuple[int, str]]) -> None:
    """Index what is not in the index: ids, and the words of each with spaces between."""
    kind = dialect(session)
    values = [{"id": row_id, "found_words": stored(words, kind)} for row_id, words in rows]
    if values:
        session.connection().execute(insertion(index, kind), values)


@cache
def insertion(index: Index, kind: str) -> Insert:
    """Takes an id, and words as ``stored`` gives them."""
    value: Any = bindparam("found_words")
    values: dict[str, Any] = {
        key_name(index, kind): bindparam("id"),
        "words": cast(value, TSVECTOR) if kind == "postgresql" else value,
    }
    return insert(index_table(index, kind)).values(values)


def drop(session: Session, index: Index, ids: Sequence[int]) -> None:
    """Take rows out that have changed. (A deleted row takes itself out.)"""
    kind = dialect(session)
    if kind != "sqlite":  # its triggers have done so
        found = index_table(index, kind)
        session.execute(delete(found).where(found.c[index.key].in_(ids)))


@contextmanager
def unmerged(session: Session) -> Iterator[None]:
    """In a SQLite file, what the block writes is not merged with what is there: FTS5 would put off
    merging for some commits, and then one would take long. ``merge`` is to follow.

    Before the commit all is set as it was, so nothing is left of it whatever happens.
    """
    if dialect(session) != "sqlite":
        yield
        return
    configure(session, "automerge", 0)
    yield
    configure(session, "automerge", AUTOMERGE)  # FTS5 writes what it has gathered before


def merge(session: Session, pages: int) -> None:
    """Merge parts of the index of a SQLite file, as far as so many pages; nothing if there are few.

    A word that is in very many rows is merged in one piece.
    """
    configure(session, "merge", pages)


def configure(session: Session, name: str, value: int) -> None:
    columns: list[ColumnClause[Any]] = [column(RECORDS.name), column("rank")]
    statement = insert(table(RECORDS.name, *columns))
    session.execute(statement.values(dict(zip(columns, (name, value), strict=True))))


def hits(
    session: Session,
    index: Index,
    asked: tuple[Sequence[Term], Sequence[str]],
    limit: int,
    below: int | None = None,
    above: int = 0,
) -> list[int]:
    """The newest ids between two, at most ``limit``: all terms of ``asked`` and all its marks."""
    kind = dialect(session)
    if kind == "postgresql":
        return newest_first(session, index, asked, limit, below, above)
    key: ColumnClause[int] = column(key_name(index, kind))
    statement = matching(session, index, asked).where(key > above)
    if below is not None:
        statement = statement.where(key < below)
    return list(session.scalars(statement.order_by(key.desc()).limit(limit)))


def newest_first(
    session: Session,
    index: Index,
    asked: tuple[Sequence[Term], Sequence[str]],
    limit: int,
    below: int | None,
    above: int,
) -> list[int]:
    """PostgreSQL: a GIN index gives all hits in no order, however many they are. So the newest ids
    are looked through first, then as many more as hits have been frequent among those; unless that
    would be more rows than all the hits there are."""
    if below is None:
        newest = index_table(index, "postgresql").c[index.key]
        below = (session.scalar(select(func.max(newest))) or 0) + 1
    key: ColumnClause[int] = column(index.key)
    statement = matching(session, index, asked)
    found: list[int] = []
    top, span = below, NEWEST
    while span and len(found) < limit:
        last = max(above, below - span - 1)
        near = statement.where(key < below, key > last).order_by(key.desc())
        found += session.scalars(near.limit(limit - len(found)))
        below = last + 1
        span = promising(limit - len(found), len(found), top - below, last - above)
    if len(found) < limit and last > above:
        far = statement.where(key < below, key > above).cte("far")
        far = far.prefix_with("MATERIALIZED", dialect="postgresql")
        every: ColumnElement[int] = far.c[index.key]
        found += session.scalars(select(every).order_by(every.desc()).limit(limit - len(found)))
    return found


def promising(wanted: int, found: int, seen: int, left: int) -> int:
    """In how many ids more there should be the hits that are wanted, after those found among the
    ids seen; 0 where these would be more than all hits that are left."""
    span = 2 * wanted * seen // found if found else 0
    return span if span * seen < left * found else 0


def matching(
    session: Session, index: Index, asked: tuple[Sequence[Term], Sequence[str]]
) -> Select[tuple[int]]:
    """The ids of all rows that have these words and marks, in no order."""
    terms, marks = asked
    kind = dialect(session)
    found = index_table(index, kind)
    statement: Select[tuple[int]] = select(found.c[key_name(index, kind)])
    if kind == "sqlite":
        return statement.where(column(index.name).op("MATCH")(fts5(terms, marks)))
    if kind == "postgresql":
        return statement.where(found.c.words.op("@@")(cast(tsquery(terms, marks), TSQUERY)))
    statement = statement.where(
        match(found.c.words, against=boolean(terms, marks)).in_boolean_mode()
    )
    for term in terms:
        if term.excluded or not is_key(term):
            there = func.locate(ascii_phrase(term), found.c.words) > 0
            statement = statement.where(not_(there) if term.excluded else there)
    return statement


def dialect(session: Session) -> str:
    return session.get_bind().dialect.name


def key_name(index: Index, kind: str) -> str:
    return "rowid" if kind == "sqlite" else index.key


def index_table(index: Index, kind: str) -> TableClause:
    return table(index.name, column(key_name(index, kind)), column("words"))


def stored(words: str, kind: str) -> str:
    """Words with spaces between, as the index of a kind of database takes them."""
    if kind == "sqlite":
        return words
    return tsvector(words.split()) if kind == "postgresql" else ascii_words(words.split())


# SQLite.


def fts5(terms: Sequence[Term], marks: Sequence[str]) -> str:
    wanted = [fts5_term(term) for term in terms if not term.excluded]
    without = [f" NOT {fts5_term(term)}" for term in terms if term.excluded]
    return f"({' AND '.join([*wanted, *marks])}){''.join(without)}"


def fts5_term(term: Term) -> str:
    return f'"{" ".join(term.words)}"{" *" if term.prefix else ""}'


# PostgreSQL.


def tsvector(words: Sequence[str]) -> str:
    return " ".join(
        word if word.startswith("_") else f"'{word}':{place}"
        for place, word in enumerate(words, start=1)
    )


def tsquery(terms: Sequence[Term], marks: Sequence[str]) -> str:
    return " & ".join([*map(tsquery_term, terms), *marks])


def tsquery_term(term: Term) -> str:
    phrase = " <-> ".join(f"'{word}'" for word in term.words) + (":*" if term.prefix else "")
    return f"!({phrase})" if term.excluded else f"({phrase})"


# MySQL and MariaDB.


def ascii_word(word: str) -> str:
    """A word in letters that InnoDB takes for a word's: different words stay different, and a
    beginning stays a beginning."""
    if word.startswith("_"):
        return word
    plain = "".join(c if c.isascii() else f"_{ord(c):x}_" for c in word)
    return f"zz{plain}"


def key_of(word: str) -> str:
    """What the FULLTEXT index has of an ``ascii_word``: of a long one its first part.

    A part may be a shorter word. So it gets an odd number of underscores, of which a word has two
    for each character that is spelt as a number.
    """
    part = word[:LONGEST_KEY]
    return part if len(word) <= LONGEST_KEY or part.count("_") % 2 else f"{part}_"


def ascii_words(words: Sequence[str]) -> str:
    """With a space at either end, so that whole words can be looked for."""
    found = [ascii_word(word) for word in words]
    parts = {key_of(word) for word in found if len(word) > LONGEST_KEY}
    return f" {' '.join([*found, *sorted(parts)])} "


def ascii_phrase(term: Term) -> str:
    phrase = " " + " ".join(map(ascii_word, term.words))
    return phrase if term.prefix else f"{phrase} "


def is_key(term: Term) -> bool:
    """Whether the FULLTEXT index alone can say that it is there."""
    return len(term.words) == 1 and len(ascii_word(term.words[0])) <= LONGEST_KEY


def boolean(terms: Sequence[Term], marks: Sequence[str]) -> str:
    keys = [f"+{mark}" for mark in marks]
    for term in terms:
        if not term.excluded:
            words = [ascii_word(word) for word in term.words]
            wanted = [key_of(word) for word in words]
            if term.prefix:
                wanted[-1] = f"{words[-1][:LONGEST_KEY]}*"
            keys += [f"+{word}" for word in wanted]
    return " ".join(keys)
