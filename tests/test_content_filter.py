"""Whole words are refused however they are written; words that merely contain them pass."""

import unicodedata

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from errors import ContentRefusedError
from services.content_filter import ContentFilter

WORDS = ("hate", "violence")
FORMAT_CHARACTERS = "\u00ad\u200b\u200c\u200d\u2060\ufeff\u202e\u061c"


def refuses(prompt: str, words: tuple[str, ...] = WORDS) -> bool:
    try:
        ContentFilter(words).check(prompt)
    except ContentRefusedError:
        return True
    return False


@pytest.mark.parametrize(
    "prompt",
    [
        "hate",
        "I HATE this",
        "no Violence, please",
        "h\u200bate",  # a zero-width space
        "ha\u00adte",  # a soft hyphen
        "\ufeffhate",
        "\uff48\uff41\uff54\uff45",  # full-width letters
        "\uff28\uff21\uff34\uff25",
        "\U0001d421\U0001d41a\U0001d42d\U0001d41e",  # mathematical bold
        "\u24d7\u24d0\u24e3\u24d4",  # in circles
        "some_hate_here",
        "__hate__",
        "(hate)",
        "love\nhate\ttea",
        "hate!",
        "love/hate",
    ],
)
def test_a_forbidden_word_is_refused(prompt: str) -> None:
    assert refuses(prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        "whatever",
        "chateau",
        "ch\u00e2teau",
        "hated",
        "nonviolence",
        "hate2",
        "2hate",
        "ha te",
        "h_ate",
        "\u00e9hate",
        "hate\u00e9",
        "",
    ],
)
def test_a_word_that_contains_one_passes(prompt: str) -> None:
    assert not refuses(prompt)


@pytest.mark.parametrize("prompt", ["blow up", "BLOW  up it", "blow\nup", "blow_up", "blow-up"])
def test_a_phrase_is_refused_however_it_is_spaced(prompt: str) -> None:
    assert refuses(prompt, ("blow up",))


@pytest.mark.parametrize("prompt", ["blow", "up blow", "blow it up", "blowup", "blow upon"])
def test_a_part_of_a_phrase_passes(prompt: str) -> None:
    assert not refuses(prompt, ("blow up",))


@pytest.mark.parametrize("words", [(), ("",), (" ", "\u200b")])
def test_an_empty_list_refuses_nothing(words: tuple[str, ...]) -> None:
    assert not refuses("hate and violence", words)


@pytest.mark.parametrize("word", ["c++", "a.b", "(x)", "[", "\\d"])
def test_a_word_is_no_regular_expression(word: str) -> None:
    assert refuses(f"such {word} here", (word,))
    assert not refuses("such axb 7 here", (word,))


def test_words_are_folded_as_prompts_are() -> None:
    assert refuses("STRASSE", ("stra\u00dfe",))
    assert refuses("hate", ("HA\u200bTE",))


disguises = st.lists(
    st.tuples(st.booleans(), st.text(FORMAT_CHARACTERS, max_size=2)), min_size=8, max_size=8
)
letters = st.text(st.characters(categories=["Ll", "Lu", "Nd"]), min_size=1, max_size=5).filter(
    lambda text: unicodedata.normalize("NFKC", text).isalnum()
)
prose = st.text(max_size=40)


def disguised(word: str, disguise: list[tuple[bool, str]]) -> str:
    """The word with some letters in upper case and invisible characters among them."""
    parts = zip(word, disguise, strict=False)
    return "".join((c.upper() if upper else c) + hidden for c, (upper, hidden) in parts)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(WORDS), disguises, prose, prose)
def test_a_word_between_spaces_is_refused_whatever_its_disguise(
    word: str, disguise: list[tuple[bool, str]], before: str, after: str
) -> None:
    assert refuses(f"{before} {disguised(word, disguise)} {after}")


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(WORDS), disguises, letters, letters)
def test_a_word_inside_another_passes(
    word: str, disguise: list[tuple[bool, str]], before: str, after: str
) -> None:
    hidden = before + disguised(word, disguise) + after
    assert not refuses(f"such {hidden} here")


def test_a_forbidden_word_comes_into_a_conversation_by_no_way(client: TestClient) -> None:
    before = client.get("/conversations").json()
    bodies = [{"initial_prompt": "I hate you"}, {"initial_prompt": "I hate you", "title": "Love"}]
    answers = [client.post("/conversations", json=body) for body in bodies]
    assert client.get("/conversations").json() == before
    path = f"/conversations/{client.post('/conversations', json={}).json()['id']}/messages"
    hello = {"prompt_content": "Hello?", "response_content": "Hello."}
    message = client.post(path, json=hello).json()
    hate: list[dict[str, str]] = [hello | {"prompt_content": "I hate you"}]
    hate.append({"prompt_content": "I hate you"})
    answers += [client.post(path, json=body) for body in hate]
    answers += [client.put(f"/messages/{message['id']}", json=body) for body in hate]
    for answer in answers:
        assert answer.status_code == 400
        assert answer.json()["code"] == "content_refused"
        assert answer.json()["detail"] == "Prompt contains inappropriate content"
    assert client.get(path).json() == [message]
