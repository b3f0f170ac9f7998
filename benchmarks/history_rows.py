"""A history of any size, made fast: users with a heavy tail, texts of usual lengths and words.

Rows go in as an import's do, through the repositories, but for the words and the sums: both are
known from how the texts are made. Everything is drawn from one seed.
"""

import itertools
import random
from collections.abc import Collection, Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from types import SimpleNamespace
from typing import Any

from sqlalchemy import text
from sqlalchemy.orm import Session

from column_types import USUAL
from database import Database, transaction
from models import LOCAL_OWNER, GenerationRecord, Status
from repositories import blocks, search, space, transfer, usage
from repositories.bulk import BulkInsert, insertion_sql, run
from words import record_marks

END = datetime(2026, 1, 1, tzinfo=UTC)
YEAR = timedelta(days=365)
VOCABULARY, SENTENCES, USERS = 50_000, 20_000, 20_000
COMMON, RARE, PHRASE = "lantern", "zyzzyva", "quiet harbour"
COMMON_EVERY = 20  # rows: 5 %
BATCH = 10_000  # rows in one statement
TOGETHER = 500_000  # rows in one transaction: an index's page is written once for many rows


def make_sentences(draw: random.Random) -> list[str]:
    vocabulary = [
        "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=2 + n % 9)) for n in range(VOCABULARY)
    ]
    weights = list(itertools.accumulate(1 / (rank + 2) for rank in range(VOCABULARY)))
    return [
        " ".join(draw.choices(vocabulary, cum_weights=weights, k=draw.randint(6, 14)))
        for _ in range(SENTENCES)
    ]


def rows(count: int, draw: random.Random) -> Iterator[dict[str, Any]]:
    """Records over the last year, in order."""
    sentences = make_sentences(draw)
    user_weights = list(itertools.accumulate(1 / (rank + 1) for rank in range(USERS)))
    rare = {count * place // 20 for place in range(1, 20)}
    step = YEAR / count
    for number in range(1, count + 1):
        said = draw.choices(sentences, k=1 + (draw.random() < 0.3))
        answer = draw.choices(sentences, k=draw.randint(3, 7))
        if number % COMMON_EVERY == 0:
            answer.append(COMMON)
        if number % 1000 == 0:
            answer.append(PHRASE)
        if number in rare:
            answer.append(RARE)
        created = END - YEAR + number * step
        yield {
            "id": number,
            "owner_id": LOCAL_OWNER,
            "user_id": f"user-{draw.choices(range(USERS), cum_weights=user_weights)[0]}",
            "conversation_id": None,
            "status": Status.FAILED if draw.random() < 0.01 else Status.COMPLETED,
            "finish_reason": "stop",
            "prompt": " ".join(said),
            "completion": " " + " ".join(answer),
            "model_name": "gpt2" if draw.random() < 0.9 else "tiny-gpt2",
            "model_fingerprint": "0123456789abcdef",
            "dtype": "bfloat16",
            "parameters": parameters(draw),
            "seed": draw.getrandbits(63),
            "prompt_tokens": 12,
            "completion_tokens": 50,
            "duration_ms": int(draw.lognormvariate(6.5, 0.6)),
            "created_at": created,
            "updated_at": created,
            "attempts": 1,
            "pinned": False,
            "cache_key": f"{draw.getrandbits(128):032x}",
        }


def parameters(draw: random.Random) -> dict[str, Any]:
    """Half of the requests leave all to the defaults, the others say how long or how."""
    if draw.random() < 0.5:
        return USUAL
    said = USUAL | {"max_new_tokens": draw.randint(10, 190)}
    return said if draw.random() < 0.6 else said | {"temperature": draw.choice([0.0, 0.7])}


def words_of(row: dict[str, Any]) -> str:
    marks = record_marks(row["owner_id"], row["user_id"], row["status"], row["model_name"])
    return f"{row['prompt']}{row['completion']} {' '.join(marks)}"


def fill(database: Database, count: int) -> None:
    """Fill an empty database. Nobody else may use it, and what is cut off is lost."""
    made = in_batches(rows(count, random.Random(6)))
    sums: dict[usage.Key, usage.Sums] = {}
    today: date | None = None
    if database.file is not None:
        hurry(database)
    with database.sessions() as session:
        aside = indexes_aside(session)
        while first := next(made, None):
            filling = Filling(database, first[0])
            with transaction(session):
                for batch in itertools.chain([first], itertools.islice(made, TOGETHER // BATCH)):
                    filling.put(session, batch)
                    for row in batch:
                        if row["created_at"].date() != today:  # the sums of a day are final
                            usage.add_to_sums(session, sums)
                            sums, today = {}, row["created_at"].date()
                        add_up(sums, row)
        with transaction(session):
            usage.add_to_sums(session, sums)
        build(session, aside)
        settle(session, count)
    database.engine.dispose()  # and so the hurry ends


def in_batches(made: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while batch := list(itertools.islice(made, BATCH)):
        yield batch


def hurry(database: Database) -> None:
    """All in memory as long as can be, nothing written twice."""
    database.engine.dispose()
    with database.engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-3000000"):
            driver.execute(f"PRAGMA {pragma}")


def indexes_aside(session: Session) -> list[str]:
    """PostgreSQL: drop the indexes until the rows are there, for random places in them would be
    written over and over once they do not fit into memory. What makes them again; SQLite: none."""
    if session.get_bind().dialect.name == "sqlite":
        return []
    found = session.execute(
        text(
            "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'"
            " AND indexname NOT IN (SELECT conname FROM pg_constraint)"
        )
    ).all()
    session.rollback()
    with transaction(session):
        for name, _ in found:
            session.execute(text(f'DROP INDEX "{name}"'))
    return [definition for _, definition in found]


def build(session: Session, indexes: Sequence[str]) -> None:
    for definition in indexes:
        with transaction(session):
            session.execute(text("SET LOCAL maintenance_work_mem = '2GB'"))
            session.execute(text("SET LOCAL statement_timeout = 0"))
            session.connection().exec_driver_sql(definition)


class Filling:
    """Puts rows into the table and the search index."""

    def __init__(self, database: Database, names: Collection[str]) -> None:
        drivername = database.url.drivername
        kind = drivername.partition("+")[0]
        self.kind = kind
        self.rows = BulkInsert(transfer.table_of(GenerationRecord), names, drivername)
        index = search.RECORDS
        columns = [search.key_name(index, kind), "words"]
        self.index_sql = insertion_sql(search.insertion(index, kind), drivername, columns)

    def put(self, session: Session, batch: Sequence[dict[str, Any]]) -> None:
        run(session, self.rows.sql, [self.rows.bind(row) for row in batch])
        words = [(row["id"], search.stored(words_of(row), self.kind)) for row in batch]
        run(session, self.index_sql, words)
        blocks.note(session, [blocks.Place.of(row) for row in batch])


def add_up(sums: dict[usage.Key, usage.Sums], row: dict[str, Any]) -> None:
    failures = int(row["status"] is Status.FAILED)
    ended = SimpleNamespace(**row, requests=1, failures=failures, cancelled=0, cached=0)
    for key in usage.keys_of(ended):
        sums.setdefault(key, usage.Sums()).add(ended)


def settle(session: Session, count: int) -> None:
    """New ids go on after the last; the planner knows what is there."""
    with transaction(session):
        transfer.go_on_after(session, GenerationRecord, count)
    if session.get_bind().dialect.name == "sqlite":
        with transaction(session):
            # In a history that grew slowly no large parts wait to be merged with the next ones.
            search.configure(session, "optimize", 0)
            session.execute(text("ANALYZE"))
        while free := space.free_pages(session):  # what the search index's merges left
            session.rollback()
            with transaction(session):
                space.give_back(session, free)
    else:
        session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        session.execute(text("VACUUM ANALYZE"))
        session.rollback()
