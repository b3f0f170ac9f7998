"""Each list is read from an index, in its order, whatever is asked of it."""

import itertools
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import event, select, text
from sqlalchemy import insert as insert_into
from sqlalchemy.orm import Session

from database import Database, transaction
from models import Conversation, ConversationQuery, GenerationRecord, HistoryQuery, Status
from repositories import blocks, conversations, lists, records
from tests.prepared import prepared_database
from tests.test_history import NOON, OWNER, ids, insert

ROWS = 6000
CONVERSATIONS = 3000
FEW = 50
TABLES = ("generation_records", "conversations", "usage_sums")
FILTERS: dict[str, dict[str, Any]] = {
    "all": {},
    "user": {"user_id": "u7"},
    "failed": {"status": Status.FAILED},
    "completed": {"status": Status.COMPLETED},
    "model": {"model_name": "gpt2"},
    "after": {"created_after": NOON + timedelta(minutes=ROWS - 500)},
    "before": {"created_before": NOON + timedelta(minutes=500)},
    "within": {
        "created_after": NOON + timedelta(minutes=500),
        "created_before": NOON + timedelta(minutes=600),
    },
}
PAIRS = [
    pytest.param(one | other, id=f"{name} {another}")
    for (name, one), (another, other) in itertools.combinations(FILTERS.items(), 2)
    if not one.keys() & other.keys()
]


def fill(session: Session) -> None:
    """Some thousand records, a minute apart, made from one by the database."""
    insert(session)
    row = session.execute(select(GenerationRecord.__table__)).mappings().one()
    session.rollback()
    rows = [
        dict(row)
        | {
            "id": row["id"] + number,
            "user_id": f"u{number % 20}",
            "status": Status.FAILED if number % 50 == 0 else Status.COMPLETED,
            "model_name": "gpt2" if number % 10 == 0 else "tiny-gpt2",
            "conversation_id": 1 + number % CONVERSATIONS,
            "created_at": NOON + timedelta(minutes=number),
        }
        for number in range(1, ROWS)
    ]
    with transaction(session):
        session.connection().execute(insert_into(Conversation), conversation_rows())
        session.connection().execute(insert_into(GenerationRecord), rows)
        blocks.note(session, [blocks.Place.of(made) for made in rows])
    analyze(session, "generation_records, conversations")


def conversation_rows() -> list[dict[str, Any]]:
    """Most of them another owner's."""
    return [
        {
            "id": number,
            "owner_id": "somebody else" if number % 300 else OWNER,
            "title": f"Of {number}",
            "model_type": "m",
            "created_at": NOON,
            "updated_at": NOON,
        }
        for number in range(1, CONVERSATIONS + 1)
    ]


def analyze(session: Session, tables: str) -> None:
    """Let the database know how many rows there are."""
    is_mysql = session.get_bind().dialect.name in ("mysql", "mariadb")
    session.execute(text(f"ANALYZE TABLE {tables}" if is_mysql else "ANALYZE"))
    session.commit()


@pytest.fixture(scope="module")
def filled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:

    with prepared_database(request.param, tmp_path_factory.mktemp("lists")) as url:
        database = Database(url)
        database.migrate()
        with database.sessions() as session:
            fill(session)
        yield database
        database.close()


on_all = pytest.mark.parametrize("filled", ["sqlite", "postgresql", "mysql"], indirect=True)


def plans(database: Database, session: Session, ask: Any) -> list[str]:
    """How the database goes about each statement that a question takes."""
    asked: list[tuple[str, Any]] = []

    def listen(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        asked.append((statement, parameters))

    event.listen(database.engine, "before_cursor_execute", listen)
    ask(session)
    event.remove(database.engine, "before_cursor_execute", listen)
    verb = "EXPLAIN QUERY PLAN" if database.engine.dialect.name == "sqlite" else "EXPLAIN"
    return [
        "\n".join(map(str, session.connection().exec_driver_sql(f"{verb} {statement}", parameters)))
        for statement, parameters in asked
        if any(f"FROM {table}" in statement for table in TABLES)
    ]


def is_served(plan: str) -> bool:
    """From an index: neither all rows are read, nor more than a few sorted.

    PostgreSQL prefers to sort where it expects hardly any rows.
    """
    bad = ("SCAN", "USE TEMP B-TREE", "Seq Scan", "Using filesort", "'ALL'", "'index'")
    return not any(sign in plan for sign in bad) and all(
        int(rows) <= FEW for rows in re.findall(r"Sort  \(.*?rows=(\d+)", plan)
    )


@on_all
@pytest.mark.parametrize(
    "query", [pytest.param(query, id=name) for name, query in FILTERS.items()] + PAIRS
)
def test_each_filter_and_pair_is_served_by_an_index(
    filled: Database, query: dict[str, Any]
) -> None:
    for after in (None, 3000):
        with filled.sessions() as session:
            asked = HistoryQuery(after=after, **query)
            found = plans(filled, session, lambda session, q=asked: lists.page(session, OWNER, q))
            assert found or "created_after" in query
            assert [plan for plan in found if not is_served(plan)] == []


@on_all
def test_other_lists_are_served_by_an_index(filled: Database) -> None:
    with filled.sessions() as session:
        for ask in (
            lambda session: conversations.page(session, OWNER, ConversationQuery()),
            lambda session: conversations.page(session, OWNER, ConversationQuery(after=2000)),
            lambda session: conversations.messages(session, OWNER, 300, HistoryQuery()),
            lambda session: conversations.messages(session, OWNER, 300, HistoryQuery(after=5000)),
            lambda session: conversations.latest(session, OWNER, 300, 5),
        ):
            found = plans(filled, session, ask)
            assert found
            assert [plan for plan in found if not is_served(plan)] == []


@on_all
@pytest.mark.parametrize(
    "unordered",
    [
        "SELECT id FROM generation_records WHERE seed = 1 ORDER BY id DESC",
        "SELECT id FROM generation_records WHERE owner_id = 'local' ORDER BY seed",
        "SELECT id FROM conversations WHERE title = 'Of 300' ORDER BY id DESC",
    ],
)
def test_a_list_without_its_index_would_be_seen(filled: Database, unordered: str) -> None:
    with filled.sessions() as session:
        (plan,) = plans(filled, session, lambda session: session.execute(text(unordered)))
        assert not is_served(plan)


@on_all
def test_a_time_far_back_is_found_within_its_block(filled: Database) -> None:
    with filled.sessions() as session:
        query = HistoryQuery(**FILTERS["within"], limit=100)
        assert list(blocks.id_ranges(session, OWNER, query)) == [(0, 4096)]
        found, more = lists.page(session, OWNER, query)
        made = [record.created_at for record in found]
        assert made == [NOON + timedelta(minutes=599 - n) for n in range(99)]
        assert not more


def test_times_are_found_whatever_the_clock_did(session: Session) -> None:
    """The clock jumps back and forth; a block says where to look, never what is there."""
    jumps = [0, 5, -400, 10, 90_000, 11, -90_000, 12]
    made = {insert(session, created_at=NOON + timedelta(days=day)): day for day in jumps}
    for first, last in itertools.product((-99_999, -400, 5, 11), (5, 12, 100_000)):
        wanted = [record for record, day in made.items() if first < day < last][::-1]
        times: dict[str, Any] = {"created_after": NOON + timedelta(days=first)}
        times["created_before"] = NOON + timedelta(days=last)
        assert ids(session, **times) == wanted


def test_times_are_found_to_both_ends_of_the_calendar(session: Session) -> None:
    first, last = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
    days = [first + timedelta(days=1), NOON, last - timedelta(minutes=5), last]
    made = [insert(session, created_at=day) for day in days]
    assert ids(session, created_after=last - timedelta(minutes=6)) == [made[3], made[2]]
    assert ids(session, created_after=last - timedelta(minutes=5)) == [made[3]]
    assert ids(session, created_before=NOON) == [made[0]]


def test_times_are_found_in_more_blocks_than_are_read_at_once(session: Session) -> None:
    made = [insert(session, id=block << blocks.BITS, created_at=NOON) for block in range(1, 21)]
    assert len(made) > 2 * blocks.FIRST_BLOCKS
    later = NOON + timedelta(days=1)
    assert ids(session, created_before=later) == made[::-1]
    assert ids(session, created_before=later, q="once") == made[::-1]
    assert ids(session, created_before=later, after=made[12]) == made[11::-1]


def test_a_model_is_found_in_its_blocks_alone(session: Session) -> None:
    """Whoever else has the same model, and whatever models the others' blocks have."""
    made = {}
    for block in range(1, 21):
        name = "rare" if block % 5 == 0 else "usual"
        made[block] = insert(session, id=block << blocks.BITS, model_name=name, created_at=NOON)
        insert(session, "another", id=(block << blocks.BITS) + 1, model_name="rare")
    rare = HistoryQuery(model_name="rare")
    looked = [above >> blocks.BITS for above, _ in blocks.id_ranges(session, OWNER, rare)]
    assert looked == [20, 15, 10, 5]
    assert ids(session, model_name="rare") == [made[block] for block in (20, 15, 10, 5)]
    assert ids(session, model_name="rare", after=made[15]) == [made[10], made[5]]
    assert ids(session, model_name="rare", status=Status.COMPLETED)[-1] == made[5]
    assert ids(session, model_name="rare", created_before=NOON) == []
    assert len(ids(session, model_name="usual")) == 16
    assert ids(session, model_name="nobody's") == []


def test_a_record_that_is_run_again_is_found_by_the_model_that_does_so(session: Session) -> None:
    record = insert(session, status=Status.INCOMPLETE, model_name="before")
    found = session.get_one(GenerationRecord, record)
    session.rollback()
    with transaction(session):
        assert records.reopen(session, found, model_name="after")
    assert ids(session, model_name="after") == [record]
    assert ids(session, model_name="before") == []
