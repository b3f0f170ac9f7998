"""What history costs at any number of rows: `make bench-db`, or

    python -m benchmarks.history --rows 10000 1000000 --databases sqlite postgresql

Each database is made anew, filled (benchmarks/history_rows.py), measured through the services and
repositories, and removed. PostgreSQL is the server that TEST_POSTGRES_URL names. Figures are
milliseconds, p50 and p99 of so many calls after a warm-up; the table goes to standard output, and
with --out all figures as JSON, from which benchmarks/history_chart.py draws. Ten million rows need
some 10 GB on SQLite and most of an hour; the default is ten thousand and a million.
"""

import argparse
import itertools
import json
import os
import random
import statistics as numbers
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from threading import Timer
from typing import Any, Literal

from sqlalchemy import select, text
from sqlalchemy.orm import Session, lazyload

from benchmarks.history_rows import COMMON, END, PHRASE, RARE, YEAR, fill
from database import Database, transaction
from models import (
    LOCAL_OWNER,
    FinishReason,
    GenerationRecord,
    HistoryQuery,
    StatisticsQuery,
    Status,
)
from repositories import lists, records
from services import history, statistics
from services.retention import Limits, Retention
from tests.databases import VARIABLES, fresh_database

Act = Callable[[Session, int], Any]
PAGE, DEEP = 10, 1000
RETENTION_SECONDS = 20.0
LARGE_PAGE = 100  # what a client that reads a whole history asks for
BY: tuple[Literal["model", "user"] | None, ...] = (None, "model", "user")
HEAVIEST = "user-0"
FILTERS: dict[str, dict[str, Any]] = {
    "all": {},
    "user": {"user_id": HEAVIEST},
    "status": {"status": Status.FAILED},
    "model": {"model_name": "tiny-gpt2"},
    "before": {"created_before": END.replace(year=2025, month=9)},
}
SEARCHES: dict[str, dict[str, Any]] = {
    "rare word": {"q": RARE},
    "word in 5 %": {"q": COMMON},
    "word in 5 %, a user": {"q": COMMON, "user_id": "user-50"},
    "word in 5 %, far back": {"q": COMMON, "created_before": END.replace(year=2025, month=3)},
    "phrase in 0.1 %": {"q": f'"{PHRASE}"'},
    "word in 5 %, by rank": {"q": COMMON, "order": "rank"},
}


def timed(database: Database, act: Act, calls: int) -> dict[str, float]:
    """p50 and p99 in milliseconds, each call in a session of its own."""
    times = []
    for call in range(calls + 3):
        with database.sessions() as session:
            start = time.perf_counter()
            act(session, call)
            times.append((time.perf_counter() - start) * 1000)
    return percentiles(times[3:])


def percentiles(times: list[float]) -> dict[str, float]:
    found = sorted(times)
    return {"p50": numbers.median(found), "p99": found[int(len(found) * 0.99)]}


def accepted(session: Session, call: int) -> int:
    values = {
        "user_id": f"user-{call}",
        "prompt": "once upon a time there was a lantern " * 3,
        "completion": "",
        "model_name": "gpt2",
        "model_fingerprint": "0123456789abcdef",
        "dtype": "bfloat16",
        "parameters": {},
        "seed": call,
        "prompt_tokens": 24,
        "completion_tokens": 0,
        "created_at": END,
        "updated_at": END,
    }
    return records.add(session, LOCAL_OWNER, **values).id


def accept_and_finish(session: Session, call: int) -> None:
    ending: dict[str, Any] = {"status": Status.COMPLETED, "finish_reason": FinishReason.STOP}
    ending |= {"completion": "and it went out one night " * 10, "completion_tokens": 50}
    with transaction(session):
        record = accepted(session, call)
    with transaction(session):
        assert records.finish(session, LOCAL_OWNER, record, duration_ms=500, **ending)


def page(after: int | None = None, limit: int = PAGE, **query: Any) -> Act:
    asked = HistoryQuery(limit=limit, after=after, **query)
    return lambda session, _: history.page(session, LOCAL_OWNER, asked)


def month_of(by: Literal["model", "user"] | None) -> Act:
    asked = StatisticsQuery(by=by, created_after=END - timedelta(days=30), created_before=END)
    return lambda session, _: statistics.statistics(session, LOCAL_OWNER, asked)


def with_offset(skip: int, limit: int, owner_id: str | None = None) -> Act:
    """The book's way to a page, of the newest; an owner's, it is served by this service's index.

    It has no source of a text to join.
    """
    statement = select(GenerationRecord).options(lazyload(GenerationRecord.source))
    statement = statement.order_by(GenerationRecord.id.desc())
    if owner_id is not None:
        statement = statement.where(GenerationRecord.owner_id == owner_id)
    statement = statement.offset(skip).limit(limit)
    return lambda session, _: session.scalars(statement).all()


def deep_place(database: Database, query: dict[str, Any]) -> int | None:
    """The id that the page before the 1,000th of a list ends with; None where it has fewer."""
    wanted = lists.filtered(select(GenerationRecord), HistoryQuery(**query))
    place = (
        wanted.with_only_columns(GenerationRecord.id)
        .where(GenerationRecord.owner_id == LOCAL_OWNER)
        .order_by(GenerationRecord.id.desc())
        .offset(PAGE * (DEEP - 1) - 1)
    )
    with database.sessions() as session:
        return session.scalar(place.limit(1))


def measure(database: Database, rows: int) -> dict[str, dict[str, float]]:
    draw = random.Random(1)
    found = {
        "get": timed(
            database, lambda s, _: history.get(s, LOCAL_OWNER, draw.randint(1, rows)), 500
        ),
        "user history": timed(
            database,
            lambda s, call: page(user_id=f"user-{draw.randint(0, 1000)}")(s, call),
            300,
        ),
    }
    for name, query in FILTERS.items():
        found[f"first page, {name}"] = timed(database, page(**query), 100)
        place = deep_place(database, query)
        if place is not None:
            found[f"1,000th page, {name}"] = timed(database, page(place, **query), 100)
    places = {"1,000th page": (PAGE * (DEEP - 1), PAGE), "last page": (rows - PAGE, PAGE)}
    if rows > LARGE_PAGE * DEEP:
        places["1,000th page of 100"] = LARGE_PAGE * (DEEP - 1), LARGE_PAGE
    for name, (skip, limit) in places.items():
        found[name] = timed(database, page(rows - skip + 1, limit), 50)
        found[f"{name}, OFFSET"] = timed(database, with_offset(skip, limit), 5)
        found[f"{name}, OFFSET by index"] = timed(
            database, with_offset(skip, limit, LOCAL_OWNER), 5
        )
    for name, query in SEARCHES.items():
        found[f"search, {name}"] = timed(database, page(**query), 20)
    for by in BY:
        name = f"statistics, 30 days{f', by {by}' if by else ''}"
        found[name] = timed(database, month_of(by), 20)
    found["accept + finish"] = timed(database, accept_and_finish, 300)
    gone = itertools.count(rows // 2)
    found["delete"] = timed(database, lambda s, _: history.delete(s, LOCAL_OWNER, next(gone)), 200)
    return found


def retention_beside_a_writer(database: Database) -> dict[str, float]:
    """The oldest 1 % goes, as far as it gets, while somebody accepts and finishes.

    ``held_up`` is how long the first statement of a transaction took at most: on SQLite it waits
    for the write lock, and the writer's own commits are not in it.
    """
    limits = Limits(records=END - YEAR + YEAR / 100)
    retention = Retention(database, None, None)
    timer = Timer(RETENTION_SECONDS, retention.stop)
    timer.start()
    with ThreadPoolExecutor(1) as pool:
        start = time.perf_counter()
        run = pool.submit(retention.run, limits)
        times: list[float] = []
        waits: list[float] = []
        while not run.done():
            with database.sessions() as session:
                began = time.perf_counter()
                accept_and_finish(session, len(times))
                times.append((time.perf_counter() - began) * 1000)
                began = time.perf_counter()
                with transaction(session):
                    accepted(session, len(times))
                    waits.append((time.perf_counter() - began) * 1000)
            time.sleep(0.005)
        seconds = time.perf_counter() - start
        removed = run.result()
    timer.cancel()
    assert removed is not None
    found = percentiles(times) | {"max": max(times), "held_up": max(waits)}
    return {"removed": removed.records, "s": seconds} | {f"writer_{k}": v for k, v in found.items()}


def bytes_a_record(database: Database) -> dict[str, float]:
    """On disk beyond the text: without the search index, and the search index alone."""
    asked = {
        "sqlite": "SELECT name, sum(pgsize) FROM dbstat GROUP BY name",
        "postgresql": "SELECT relname, pg_total_relation_size(oid) FROM pg_class"
        " WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace",
    }
    texts = "SELECT count(*), sum(length(prompt) + length(completion)) FROM generation_records"
    with database.sessions() as session:
        found = session.execute(text(asked[database.engine.dialect.name])).all()
        rows, text_bytes = session.execute(text(texts)).one()  # the texts are ASCII
    sizes = {name: float(size) for name, size in found}
    index = sum(size for name, size in sizes.items() if "search" in name)
    return {
        "text": int(text_bytes) / rows,
        "beyond": (sum(sizes.values()) - index - int(text_bytes)) / rows,
        "search": index / rows,
    }


def run(kind: str, rows: int) -> dict[str, Any]:
    with (
        tempfile.TemporaryDirectory(prefix="history-") as folder,
        fresh_database(kind, Path(folder)) as url,
    ):
        database = Database(url, timeout=600)
        database.migrate()
        start = time.perf_counter()
        fill(database, rows)
        seconds = time.perf_counter() - start
        result = {"database": kind, "rows": rows, "fill_s": seconds} | figures(database, rows)
        database.close()
    return result


def figures(database: Database, rows: int) -> dict[str, Any]:
    return {
        "bytes": bytes_a_record(database),
        "ms": measure(database, rows),
        "retention": retention_beside_a_writer(database),
    }


def report(result: dict[str, Any]) -> None:
    size = result["bytes"]
    print(f"\n{result['database']}, {result['rows']:,} rows, filled in {result['fill_s']:.0f} s")
    print(
        f"bytes a record: text {size['text']:.0f}, beyond it {size['beyond']:.0f},"
        f" search index {size['search']:.0f}"
    )
    for name, figure in result["ms"].items():
        print(f"  {name:36} p50 {figure['p50']:9.2f} ms   p99 {figure['p99']:9.2f} ms")
    kept = result["retention"]
    print(
        f"retention of {kept['removed']:,} records: {kept['s']:.1f} s; accept + finish meanwhile"
        f" p50 {kept['writer_p50']:.1f} ms, p99 {kept['writer_p99']:.1f}, at most"
        f" {kept['writer_max']:.1f}, its longest wait to write {kept['writer_held_up']:.1f}"
    )


def at_hand() -> list[str]:
    return ["sqlite"] + ["postgresql"] * (VARIABLES["postgresql"] in os.environ)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the history at several sizes.")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument(
        "--databases", nargs="+", default=at_hand(), choices=["sqlite", "postgresql"]
    )
    parser.add_argument("--out", type=Path, help="all figures, as JSON")
    arguments = parser.parse_args()
    results = []
    for kind, rows in itertools.product(arguments.databases, arguments.rows):
        results.append(run(kind, rows))
        report(results[-1])
        if arguments.out:
            arguments.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
