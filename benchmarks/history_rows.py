"""A history of any size, made fast: users with a heavy tail, texts of usual lengths and words.

Rows go in as an import's do, through the repositories, but for the words and the sums: both are
known from how the texts are made. Everything is drawn from one seed.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import insert, text
from sqlalchemy.orm import Session

from database import Database, transaction
from models import LOCAL_OWNER, GenerationRecord, Status, Usage, UsageDelta
from repositories import blocks, search, transfer, usage
from words import record_marks

END = datetime(2026, 1, 1, tzinfo=UTC)
YEAR = timedelta(days=365)
VOCABULARY, SENTENCES, USERS = 50_000, 20_000, 20_000
COMMON, RARE, PHRASE = "lantern", "zyzzyva", "quiet harbour"
COMMON_EVERY = 20  # rows: 5 %
BATCH = 5_000
PARAMETERS = {
    "max_new_tokens": 50,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "stop": [],
}


@dataclass
class Made:
    rows: int
    text_bytes: int


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
            "parameters": PARAMETERS,
            "seed": draw.getrandbits(63),
            "prompt_tokens": 12,
            "completion_tokens": 50,
            "duration_ms": int(draw.lognormvariate(6.5, 0.6)),
            "created_at": created,
            "updated_at": created,
            "attempts": 1,
            "cache_key": f"{draw.getrandbits(128):032x}",
        }


def words_of(row: dict[str, Any]) -> str:
    marks = record_marks(row["owner_id"], row["user_id"], row["status"], row["model_name"])
    return f"{row['prompt']}{row['completion']} {' '.join(marks)}"


def fill(database: Database, count: int) -> Made:
    """Fill an empty database."""
    made, size = rows(count, random.Random(6)), 0
    sums: dict[usage.Key, usage.Sums] = {}
    with database.sessions() as session:
        while batch := list(itertools.islice(made, BATCH)):
            size += sum(len(row["prompt"]) + len(row["completion"]) for row in batch)
            with transaction(session):
                session.connection().execute(insert(transfer.table_of(GenerationRecord)), batch)
                blocks.note(session, [(row["id"], row["created_at"]) for row in batch])
                search.put(session, search.RECORDS, [(row["id"], words_of(row)) for row in batch])
            for row in batch:
                add_up(sums, row)
        totals = [
            key._asdict() | dict(found.counts) | {"latencies": usage.packed(found.latencies)}
            for key, found in sums.items()
        ]
        for start in range(0, len(totals), BATCH):
            with transaction(session):
                session.connection().execute(insert(Usage), totals[start : start + BATCH])
        settle(session, count)
    return Made(count, size)


def add_up(sums: dict[usage.Key, usage.Sums], row: dict[str, Any]) -> None:
    counted = dict.fromkeys(usage.COUNTED, 0) | {
        "requests": 1,
        "failures": int(row["status"] is Status.FAILED),
        "prompt_tokens": row["prompt_tokens"],
        "completion_tokens": row["completion_tokens"],
    }
    named = {name: row[name] for name in ("owner_id", "user_id", "model_name", "created_at")}
    delta = UsageDelta(**named, **counted, duration_ms=row["duration_ms"])
    for key in usage.keys_of(delta):
        sums.setdefault(key, usage.Sums()).add(delta)


def settle(session: Session, count: int) -> None:
    """New ids go on after the last; the planner knows what is there."""
    with transaction(session):
        transfer.go_on_after(session, GenerationRecord, count)
    if session.get_bind().dialect.name == "sqlite":
        with transaction(session):
            session.execute(text("ANALYZE"))
    else:
        session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        session.execute(text("VACUUM ANALYZE"))
        session.rollback()
