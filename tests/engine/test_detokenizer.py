import random

import pytest

from engine.detokenizer import Detokenizer
from engine.loading import LoadedModel


def whole(loaded: LoadedModel, prompt: list[int], ids: list[int]) -> str:
    return loaded.decode(prompt + ids)[len(loaded.decode(prompt)) :]


def test_pieces_join_to_the_text_whatever_the_tokens_are(loaded: LoadedModel) -> None:
    rng = random.Random(1)
    prompt = loaded.encode("Once upon a time")
    for _ in range(60):
        ids = [rng.randrange(1, 4096 if rng.random() < 0.5 else 260) for _ in range(40)]
        subject = Detokenizer(loaded.decode, prompt, ())
        shown = ""
        for token in ids:
            subject.push([token])
            assert subject.shown.startswith(shown)
            shown = subject.shown
        subject.finish()
        assert subject.text.startswith(shown)
        assert subject.text == whole(loaded, prompt, ids)


def test_tokens_that_come_together_are_the_same_text(loaded: LoadedModel) -> None:
    rng = random.Random(2)
    prompt = loaded.encode("Once upon a time")
    for _ in range(60):
        ids = [rng.randrange(1, 4096 if rng.random() < 0.5 else 260) for _ in range(40)]
        subject = Detokenizer(loaded.decode, prompt, ())
        while subject.pushed < len(ids):
            subject.push(ids[subject.pushed : subject.pushed + rng.randrange(12)])
            assert whole(loaded, prompt, ids).startswith(subject.shown)
        subject.finish()
        assert subject.text == whole(loaded, prompt, ids)


def test_a_piece_never_ends_in_half_a_character(loaded: LoadedModel) -> None:
    prompt = loaded.encode("The ")
    text = "naïve 🙂 façade 日本語 — “quoted” 👩‍👩‍👧"
    ids = loaded.encode(text)
    subject = Detokenizer(loaded.decode, prompt, ())
    for token in ids:
        subject.push([token])
        assert "\ufffd" not in subject.shown
        assert text.startswith(subject.shown)
    assert subject.shown == text


def test_no_text_holds_nul(loaded: LoadedModel) -> None:
    the, (nul,) = loaded.encode("The king"), loaded.encode("\0")
    assert loaded.tokenizer.decode([nul]) == "\0"
    subject = Detokenizer(loaded.decode, the, ("sea",))
    ids = [nul, nul, *loaded.encode(" of"), nul, *loaded.encode(" the sea"), nul]
    for token in ids:
        subject.push([token])
        assert "\ufffd\ufffd of\ufffd the ".startswith(subject.shown)
    assert subject.stopped
    assert subject.text == "\ufffd\ufffd of\ufffd the "
    assert whole(loaded, the, ids) == "\ufffd\ufffd of\ufffd the sea\ufffd"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("house",), "the old "),
        ((" by the sea",), "the old house"),
        (("zzz", "old", "the old house"), "the "),
        (("sea!",), "the old house by the sea"),
        (("",), "the old house by the sea"),
    ],
)
def test_text_is_cut_before_the_first_stop_string_and_never_shows_part_of_it(
    loaded: LoadedModel, stop: tuple[str, ...], expected: str
) -> None:
    subject = Detokenizer(loaded.decode, loaded.encode("In"), stop)
    for token in loaded.encode("the old house by the sea"):
        subject.push([token])
        assert expected.startswith(subject.shown)
    subject.finish()
    assert subject.text == expected
    assert subject.stopped == (expected != "the old house by the sea")
