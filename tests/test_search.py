"""What was said is found again, the same on every database, and not at all once it is gone."""

import random
import unicodedata
from datetime import timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError
from sqlalchemy import text
from sqlalchemy.orm import Session

from database import Database, transaction
from models import (
    ConversationCreate,
    ConversationQuery,
    ConversationUpdate,
    FinishReason,
    HistoryQuery,
    MessageUpdate,
    Status,
)
from repositories import records, removal
from repositories import search as index
from services import conversations, history
from tests.service import in_process, sessions_of
from tests.test_history import NOON, OWNER, insert, link
from words import (
    FOLDING,
    LONGEST_WORD,
    MOST_BYTES,
    MOST_WORDS,
    WINDOW,
    Term,
    parse_search,
    snippet,
    words,
)

TEXTS = {
    "dragon": "The Dragon's cave: it breathed fire, fire and more fire.",
    "cafe": "Ein Café in der Straße, über dem Fluß; naïve ﬁgures.",
    "moscow": "Ёлка в Москве. Достопримечательности были красивыми.",
    "chinese": "你好，世界！我们在北京大学学习中文。",
    "japanese": "東京タワーへ行きました。ガラス",
    "korean": "나는 학교에서 공부한다",
    "thai": "ภาษาไทยง่ายมาก",
    "hindi": "हिन्दी में लिखा हुआ",
    "arabic": "مَرْحَبًا بالعالم",
    "emoji": "Party 🎉🐉 tonight",
    "code": "def foo_bar(x): return x**2 + 3.14 # C++ isn't Python",
    "stop": "to be or not to be: that is the question, i am who i am",
    "long": "a" * 70 + "x " + "b" * 100 + " end",
}


@pytest.fixture
def found(session: Session) -> Any:
    """A function: which of the texts a search finds, newest first."""
    ids = {insert(session, prompt=said, completion=""): name for name, said in TEXTS.items()}

    def names(q: str) -> list[str]:
        return [ids[record] for record in ids_of(session, q)]

    return names


def ids_of(session: Session, q: str, owner: str = OWNER, **query: Any) -> list[int]:
    page, _ = history.page(session, owner, HistoryQuery(q=q, limit=100, **query))
    ids = [record.id for record in page]
    session.rollback()
    return ids


def test_words_of_any_script_are_found(found: Any) -> None:
    for q, names in {
        "dragon": ["dragon"],
        "DRAGON fire": ["dragon"],
        "drag": [],
        "drag*": ["dragon"],
        "fire -dragon": [],
        "cafe": ["cafe"],
        "CAFÉ strasse": ["cafe"],
        "uber fluss naive figures": ["cafe"],
        "елка": ["moscow"],
        "МОСКВЕ": ["moscow"],
        "достопримеч*": ["moscow"],
        "достопримечательности": ["moscow"],
        "достопримечательност": [],
        "достопримечательностями": [],
        "世界": ["chinese"],
        "界世": [],
        "北京 世界": ["chinese"],
        "大学*": ["chinese"],
        "東京タワー": ["japanese"],
        "ｶﾞﾗｽ": ["japanese"],
        "학교": ["korean"],
        "ง่าย": ["thai"],
        "हिन्दी": ["hindi"],
        "مرحبا": ["arabic"],
        "🐉": ["emoji"],
        "🎉 -🐉": [],
        "foo_bar": ["code"],
        '"foo bar" 3.14': ["code"],
        "x**2": ["code"],
        "isn't": ["code"],
        "isn't*": ["code"],
        "isn*": ["code"],
        "isnt": [],
        "🐉*": ["emoji"],
        "i": ["stop"],
        "to the": ["stop"],
        "www": [],
        "a" * 70: ["long"],
        "b" * 100 + " end": ["long"],
        "a" * 66 + "*": ["long"],
        "b" * 30 + "*": ["long"],
        "b" * 30: [],
    }.items():
        assert (q, found(q)) == (q, names)


def test_phrases_are_exact_and_minus_takes_away(found: Any) -> None:
    for q, names in {
        '"fire and more"': ["dragon"],
        '"fire more"': [],
        '"more fire" "it breathed"': ["dragon"],
        '"to be or not to be"': ["stop"],
        '"be to"': [],
        '"not to be that"': ["stop"],
        "well-known": [],
        "question-i": ["stop"],
        'the -"or not"': ["dragon"],
        'the -"not or"': ["stop", "dragon"],
        "the -drag*": ["stop"],
        "the -question": ["dragon"],
        "“more fire”": ["dragon"],
        '"foo ba"': [],
        "foo_ba*": ["code"],
        "foo_baz*": [],
        "fire !": ["dragon"],
    }.items():
        assert (q, found(q)) == (q, names)


GEORGIAN = "აბგდევზთიკლმნოპჟრს"
ETHIOPIC = "\u1200"
LONG_TEXTS = {
    "long": f"x {GEORGIAN} y",
    "its beginning": GEORGIAN[:13],  # as long, spelt in ASCII, as a key may be
    "mixed": "abc" + "ж" * 20,
    "one letter": ETHIOPIC * 20,
}


def test_a_long_words_beginning_is_another_word(session: Session) -> None:
    names = {insert(session, prompt=said, completion=""): n for n, said in LONG_TEXTS.items()}
    for q, found in {
        GEORGIAN: ["long"],
        GEORGIAN[:13]: ["its beginning"],
        f"x -{GEORGIAN[:13]}": ["long"],
        f"x -{GEORGIAN}": [],
        f'"x {GEORGIAN}"': ["long"],
        f'"x {GEORGIAN[:13]}"': [],
        f"{GEORGIAN[:13]} y": [],
        f"{GEORGIAN[:12]}*": ["its beginning", "long"],
        f"{GEORGIAN[:13]}*": ["its beginning", "long"],
        f"{GEORGIAN[:14]}*": ["long"],
        "abc" + "ж" * 15: [],
        "abc" + "ж" * 16: [],
        "abc" + "ж" * 20: ["mixed"],
        "abc" + "ж" * 16 + "*": ["mixed"],
        ETHIOPIC * 13: [],
        ETHIOPIC * 20: ["one letter"],
        ETHIOPIC * 13 + "*": ["one letter"],
    }.items():
        assert (q, [names[record] for record in ids_of(session, q)]) == (q, found)


def test_no_operator_of_a_database_gets_through(found: Any) -> None:
    for q in (
        "dragon OR cafe",
        "dragon | cafe",
        "dragon & cafe",
        "dragon NEAR cafe",
        "words:dragon cafe",
        "dragon AND cafe",
        "+dragon +cafe",
        "dragon') OR ('cafe",
        "dragon <-> cafe",
        "(dragon cafe)",
        "dragon ^ cafe",
        "~dragon @cafe",
        "\\'dragon cafe",
        "dragon % _ cafe",
        "'' dragon NOT cafe",
        "_o _t dragon cafe",
    ):
        assert (q, found(q)) == (q, [])


@pytest.mark.parametrize(
    "q", ["", " ", '"', 'a "b', "-a", '-"a b"', "!!", '""', "*", "a*", "-", "é*"]
)
def test_a_search_for_nothing_is_refused(q: str) -> None:
    with pytest.raises(ValidationError):
        HistoryQuery(q=q)
    with pytest.raises(ValidationError):
        ConversationQuery(q=q)


def test_what_cannot_be_searched_is_422(client: TestClient) -> None:
    for url in ("/history", "/conversations"):
        for q in ("", "-a", '"a', "a*", "x " * 33, "x" * 501):
            answer = client.get(url, params={"q": q})
            assert (answer.status_code, answer.json()["code"]) == (422, "validation_error")
    assert client.get("/history?order=rank").status_code == 422
    assert client.get("/history", params={"q": "x" * 500}).json() == []


def test_a_continuation_goes_on_in_its_prompts_word(session: Session) -> None:
    record = insert(session, prompt="Once upon a ti", completion="me there was")
    assert ids_of(session, '"a time there"') == [record]
    assert ids_of(session, "ti") == []


def test_search_goes_with_every_filter(session: Session) -> None:
    plain = insert(session)
    anna = insert(session, user_id="anna")
    failed = insert(session, user_id="anna", status=Status.FAILED)
    gpt2 = insert(session, model_name="gpt2")
    late = insert(session, created_at=NOON + timedelta(days=1))
    insert(session, user_id="anna", completion="nothing of it")
    assert ids_of(session, "upon") == [late, gpt2, failed, anna, plain]
    assert ids_of(session, "upon", user_id="anna") == [failed, anna]
    assert ids_of(session, "upon", user_id="anna", status=Status.FAILED) == [failed]
    assert ids_of(session, "upon", status=Status.FAILED, model_name="gpt2") == []
    assert ids_of(session, "upon", model_name="gpt2") == [gpt2]
    assert ids_of(session, "upon", created_after=NOON) == [late]
    assert ids_of(session, "upon", created_before=NOON + timedelta(1), user_id="anna") == [
        failed,
        anna,
    ]


def test_nobody_finds_what_another_owner_has(session: Session) -> None:
    theirs = insert(session, owner="somebody else")
    assert ids_of(session, "upon") == []
    assert ids_of(session, "upon", owner="somebody else") == [theirs]
    conversations.create(session, "somebody else", ConversationCreate(title="Upon"), "m")
    assert titles(session, "upon") == []


def test_pages_of_a_search_lead_to_its_end(database_url: str) -> None:
    with in_process(DATABASE_URL=database_url) as own, sessions_of(own)() as session:
        wanted = []
        for number in range(7):
            wanted.append(insert(session, prompt=f"café & {number}", user_id="ä"))
            insert(session, user_id="ä")
        url: str | None = "/history"
        query: dict[str, Any] = {"q": '"CAFE" -3', "user_id": "ä", "limit": 2}
        seen: list[int] = []
        while url is not None:
            answer = own.get(url, params=query) if query else own.get(url)
            assert answer.status_code == 200
            assert all("<mark>café</mark> &amp; " in item["snippet"] for item in answer.json())
            seen += [record["id"] for record in answer.json()]
            url, query = link(answer), {}
        assert seen == [record for record in wanted[::-1] if record != wanted[3]]
        assert own.get("/history").json()[0]["snippet"] is None


def test_a_record_is_found_as_soon_as_it_has_ended(session: Session) -> None:
    ids = [insert(session, status=Status.IN_PROGRESS, completion="", lease_id=9) for _ in range(3)]
    assert ids_of(session, "once") == []
    with transaction(session):
        records.checkpoint(session, [records.Grown(ids[0], "half", 1)])
    assert ids_of(session, "half") == []
    ending = {"status": Status.FAILED, "finish_reason": FinishReason.ERROR, "completion": " whole"}
    with transaction(session):
        assert records.finish(session, OWNER, ids[0], **ending)
        assert not records.finish(session, OWNER, ids[0], **ending)
    assert ids_of(session, "once") == [ids[0]]
    assert ids_of(session, "whole", status=Status.FAILED) == [ids[0]]
    with transaction(session):
        assert records.interrupt(session, [9]) == 2
    assert ids_of(session, "once", status=Status.INCOMPLETE) == [ids[2], ids[1]]


def test_a_record_that_runs_again_is_not_found_meanwhile(session: Session) -> None:
    record = insert(session, status=Status.INCOMPLETE)
    with transaction(session):
        found = records.get(session, OWNER, record)
        assert found is not None
        assert records.reopen(session, found)
    assert indexed(session, "once") == []
    ending = {"status": Status.COMPLETED, "finish_reason": FinishReason.STOP}
    with transaction(session):
        end = records.RecordEnd(OWNER, record, ending | {"completion": " again"}, attempt=2)
        assert records.finish_all(session, [end]) == [True]
    assert indexed(session, "once") == indexed(session, "again") == [record]


@pytest.mark.parametrize("seed", range(3))
def test_hits_are_the_newest_however_frequent(
    session: Session, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(index, "NEWEST", 4)  # what PostgreSQL looks through first
    draw = random.Random(seed)
    said = [draw.choice(["often", "often", "seldom", "nothing"]) for _ in range(60)]
    said[draw.randrange(60)] = "once"
    ids = {insert(session, prompt=word, completion=""): word for word in said}
    for _ in range(60):
        word = draw.choice(["often", "seldom", "once", "never"])
        limit, above = draw.randint(1, 30), draw.choice([0, draw.randint(0, 60)])
        below = draw.choice([None, draw.randint(above, 70)])
        hits = index.hits(session, index.RECORDS, ([Term((word,))], []), limit, below, above)
        every = [i for i, w in ids.items() if w == word and above < i < (below or 1000)]
        assert hits == sorted(every, reverse=True)[:limit]


def test_who_inherits_a_text_is_found_by_it(session: Session) -> None:
    source = insert(session, prompt="unicorn")
    heir = insert(session, prompt="", completion="", source_id=source)
    assert indexed(session, "unicorn") == [source]
    history.delete(session, OWNER, source)
    assert indexed(session, "unicorn") == [heir]


def test_a_record_that_is_gone_is_not_in_the_index(session: Session) -> None:
    first, second, third = (insert(session, prompt=f"unicorn {n}") for n in range(3))
    history.delete(session, OWNER, second)
    assert indexed(session, "unicorn") == [third, first]
    with transaction(session):
        session.execute(text("DELETE FROM generation_records"))
    assert indexed(session, "unicorn") == []
    fourth = insert(session, prompt="unicorn")
    assert indexed(session, "unicorn") == [fourth]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_removals_leave_merging_to_steps_of_its_own(session: Session) -> None:
    ids = [insert(session, prompt=f"dragon {number}") for number in range(40)]
    before = parts(session)
    session.rollback()
    for number, record in enumerate(ids[1:], 1):
        with transaction(session):
            with index.unmerged(session):
                removal.remove_all(session, [record])
            assert parts(session) == before + number  # before the commit could merge it
    for _ in range(20):
        with transaction(session):
            index.merge(session, 8)
    assert parts(session) < index.AUTOMERGE
    assert ids_of(session, "dragon") == ids[:1]
    kept = text("SELECT v FROM record_search_config WHERE k = 'automerge'")
    assert session.scalar(kept) == index.AUTOMERGE


def parts(session: Session) -> int:
    """How many parts the index of a SQLite file has."""
    return len(session.execute(text("SELECT DISTINCT segid FROM record_search_idx")).all())


def indexed(session: Session, q: str) -> list[int]:
    """What the index alone says, without a look at the records."""
    ids = index.hits(session, index.RECORDS, ([Term((q,))], []), 100)
    session.rollback()
    return ids


def make_thread(session: Session, title: str, *said: str) -> tuple[int, list[int]]:
    made = conversations.create(session, OWNER, ConversationCreate(title=title), "m")
    return made.id, [
        insert(session, prompt=words, completion="", conversation_id=made.id) for words in said
    ]


def titles(session: Session, q: str, **query: Any) -> list[str]:
    found, _ = conversations.page(session, OWNER, ConversationQuery(q=q, **query))
    names = [conversation.title for conversation in found]
    session.rollback()
    return names


def test_a_conversation_is_found_by_its_title_and_its_messages(session: Session) -> None:
    make_thread(session, "Of dragons", "Once upon", "a dragon")
    make_thread(session, "Of knights", "a dragon", "dragons upon a dragon")
    make_thread(session, "Of nothing")
    insert(session, prompt="dragon in no conversation")
    assert titles(session, "dragon") == ["Of knights", "Of dragons"]
    assert titles(session, "dragons") == ["Of knights", "Of dragons"]
    assert titles(session, "dragons -knights") == ["Of knights", "Of dragons"]  # by a message
    assert titles(session, "of -knights") == ["Of nothing", "Of dragons"]
    assert titles(session, '"once upon"') == ["Of dragons"]
    assert titles(session, "of", take=1) == ["Of nothing"]
    assert titles(session, "of", take=1, skip=1) == ["Of knights"]


def test_a_changed_title_and_a_changed_message_are_found_anew(session: Session) -> None:
    conversation, (message,) = make_thread(session, "Before", "apples")
    conversations.change(session, OWNER, conversation, ConversationUpdate(title="Behind"))
    conversations.change_message(session, OWNER, message, MessageUpdate(prompt_content="pears"))
    assert titles(session, "before") == titles(session, "apples") == []
    assert titles(session, "behind") == titles(session, "pears") == ["Behind"]
    assert ids_of(session, "apples") == []
    assert ids_of(session, "pears") == [message]


def test_a_deleted_conversation_takes_its_messages_from_the_index(session: Session) -> None:
    conversation, _ = make_thread(session, "Of unicorns", "unicorn", "unicorn")
    _, kept = make_thread(session, "Of horses", "unicorn")
    conversations.delete(session, OWNER, conversation)
    assert indexed(session, "unicorn") == kept
    assert titles(session, "unicorns") == []


def test_a_title_the_model_suggests_is_found(database_url: str) -> None:
    with in_process(DATABASE_URL=database_url) as own:
        made = own.post("/conversations", json={"initial_prompt": "Zebras and lions"}).json()
        found = own.get("/conversations?q=zebras").json()
        assert [(item["id"], item["snippet"]) for item in found] == [
            (made["id"], "<mark>Zebras</mark> and lions")
        ]


def test_the_best_comes_first_by_rank_and_pages_go_on_from_there(client: TestClient) -> None:
    with sessions_of(client)() as session:
        said = ["quagga once " + "and so on " * 60, "quagga quagga quagga", "a quagga", "a quagga"]
        long, best, first, second = (insert(session, prompt=p, completion="") for p in said)
    wanted = [best, second, first, long]
    url: str | None = "/history?q=quagga&order=rank&limit=3"
    seen = []
    while url is not None:
        answer = client.get(url)
        seen += [record["id"] for record in answer.json()]
        client.delete(f"/history/{seen[-1]}")  # where the next page begins: nothing is skipped
        url = link(answer)
    assert seen == wanted
    gone = client.get(f"/history?q=quagga&order=rank&after={long + 1000}")
    assert (gone.status_code, gone.json()["code"]) == (422, "invalid_request")


def test_words_are_what_cutting_every_text_and_every_word_gives() -> None:
    draw = random.Random(7)
    alphabets = ("aB_ 9.\n", "é\u0301Ωß ﬁ世👍", "".join(map(chr, range(1, 0x500))))
    for length in (0, 1, 63, 64, 65, 200, 3000, MOST_WORDS + 1):
        for alphabet in (*alphabets, "a", ["a "], ["👍"], ["Ω" * 70 + "-"]):
            said = "".join(draw.choices(alphabet, k=length))
            folded = unicodedata.normalize("NFKC", said).translate(FOLDING)
            expected = [word[:LONGEST_WORD] for word in folded.split()[:MOST_WORDS]]
            while len("".join(expected).encode()) > MOST_BYTES:
                del expected[len(expected) // 2 :]
            assert words(said) == expected


def test_a_snippet_is_safe_html_around_the_first_match() -> None:
    said = "x" * 300 + " <b>Dragons</b> & DRAGONS, a dragon's " + "y " * 300
    shown = snippet(said, parse_search("dragons"))
    assert shown.startswith(
        "…&lt;b&gt;<mark>Dragons</mark>&lt;/b&gt; &amp; <mark>DRAGONS</mark>, a"
    )
    assert shown.endswith("…")
    assert len(shown) < 300
    assert snippet("世界大学", parse_search("大学")) == "世界<mark>大学</mark>"
    assert snippet("Cafe\u0301!", parse_search("cafe")) == "<mark>Café</mark>!"
    assert snippet("замо\u0301, а", parse_search("замо")) == "<mark>замо\u0301</mark>, а"
    assert snippet("ﾃﾞｰﾀ ﾃｽﾄ", parse_search("データ")) == "<mark>ﾃﾞｰﾀ</mark> ﾃｽﾄ"
    assert snippet("a🐉\ufe0f b", parse_search("🐉")) == "a<mark>🐉\ufe0f</mark> b"
    assert snippet("a" + "x\u0302" * 300, parse_search("zebra")) == "a" + "x\u0302" * 80 + "…"


def test_a_snippet_of_a_long_text_is_that_of_looking_at_each_character(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw = random.Random(3)
    asked = [parse_search(q) for q in ("a b", "ab*", '"b a"', '"a b a"', "世", "aaaa", "👍")]
    cases = []
    for alphabet in ("ab  c", "ab c世é\u0301 👍", "a b cd  "):
        for terms in asked:
            said = "".join(draw.choices(alphabet, k=draw.randint(0, 3000)))
            cases.append((said, terms, snippet(said, terms)))
    assert max(len(said) for said, _, _ in cases) < WINDOW  # so far, no window was left out
    monkeypatch.setattr("words.WINDOW", 200)
    assert [snippet(said, terms) for said, terms, _ in cases] == [shown for *_, shown in cases]


def test_texts_of_any_size_are_kept_and_found(session: Session) -> None:
    """PostgreSQL takes 1 MiB of words and 16,383 positions of a text, InnoDB 84 letters a word."""
    many = " ".join(f"w{number}" for number in range(20_000))
    huge = " ".join(chr(0x10300 + number % 20) * 64 + str(number) for number in range(3000))
    ids = [insert(session, prompt=said, completion="") for said in (many, huge, "ﷺ" * 60_000)]
    assert ids_of(session, '"w9998 w9999"') == ids[:1]
    assert ids_of(session, "صلى") == ids[2:]


def test_the_migration_indexes_what_was_there(
    database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alembic import command
    from alembic.config import Config

    from tests.service import ROOT

    with database.sessions() as session:
        record = insert(session)
        running = insert(session, status=Status.IN_PROGRESS)
        make_thread(session, "Of unicorns")
    monkeypatch.setenv("DATABASE_URL", database_url)
    config = Config(ROOT / "alembic.ini")
    command.downgrade(config, "0002")
    command.upgrade(config, "head")
    with database.sessions() as session:
        assert ids_of(session, "once") == [record]
        assert running not in indexed(session, "once")
        assert titles(session, "unicorns") == ["Of unicorns"]
        history.delete(session, OWNER, record)
        assert indexed(session, "once") == []


def kept_words(session: Session) -> list[tuple[int, str]]:
    """As a server keeps them."""
    rows = session.execute(text("SELECT record_id, words FROM record_search ORDER BY record_id"))
    titles = session.execute(text("SELECT conversation_id, words FROM title_search"))
    found = [tuple(row) for row in (*rows, *titles)]
    session.rollback()
    return found


@pytest.mark.parametrize("database_url", ["mysql"], indirect=True)
def test_a_migration_tells_the_parts_of_long_words_from_words(
    session: Session, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alembic import command
    from alembic.config import Config

    from tests.service import ROOT

    for said in (*LONG_TEXTS.values(), *TEXTS.values()):
        insert(session, prompt=said, completion="")
    make_thread(session, f"{GEORGIAN} {GEORGIAN[::-1]} b")
    as_written = kept_words(session)
    monkeypatch.setenv("DATABASE_URL", database_url)
    config = Config(ROOT / "alembic.ini")
    command.downgrade(config, "0010")
    before = kept_words(session)
    assert len({*before} - {*as_written}) == 4  # three records, and the title
    assert indexed(session, GEORGIAN[:13]) == [2, 1]  # as it was before
    command.upgrade(config, "0011")
    assert kept_words(session) == as_written
    assert indexed(session, GEORGIAN[:13]) == [2]
