import random
from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers

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


def test_a_character_that_the_prompt_began_is_not_taken_for_half_of_one(
    loaded: LoadedModel,
) -> None:
    ids = loaded.encode("🧿")
    assert len(ids) > 2
    for cut in range(1, len(ids)):
        subject = Detokenizer(loaded.decode, ids[:cut], ())
        subject.push(ids[cut:])
        subject.finish()
        assert subject.text == whole(loaded, ids[:cut], ids[cut:])


@pytest.fixture(scope="module")
def with_fallback() -> Tokenizer:
    """Letters and, for all other characters, their bytes: as Llama 2, Mistral and Gemma have."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def pushed(
    decode: Callable[[list[int]], str], prompt: list[int], ids: list[int], at_once: int
) -> str:
    """The text of tokens that come so many at a time; what is shown is never taken back."""
    subject = Detokenizer(decode, prompt, ())
    shown = ""
    for start in range(0, len(ids), at_once):
        subject.push(ids[start : start + at_once])
        assert subject.shown.startswith(shown)
        shown = subject.shown
    subject.finish()
    assert subject.text.startswith(shown)
    return subject.text


@pytest.mark.parametrize("at_once", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("prompt", ["say hi", "日本語日本語", "naïve 🙂🙂🙂"])
@pytest.mark.parametrize("text", [" ab 😀😀😀 cd", "日本語日本語日本語 ok", "é", "ééééééééé🙂é日x"])
def test_characters_that_come_byte_by_byte_are_put_together(
    with_fallback: Tokenizer, prompt: str, text: str, at_once: int
) -> None:
    before, ids = with_fallback.encode(prompt).ids, with_fallback.encode(text).ids
    assert pushed(with_fallback.decode, before, ids, at_once) == text


@pytest.mark.parametrize("at_once", [1, 2, 3, 7, 100])
def test_a_byte_that_is_no_character_spoils_nothing_before_it(
    with_fallback: Tokenizer, at_once: int
) -> None:
    prompt, face, rest = (with_fallback.encode(t).ids for t in ("say hi", "😀😀😀", " ok 日本"))
    half = face[:2]
    text = pushed(with_fallback.decode, prompt, [*face, *half, *rest, *half], at_once)
    assert text == "😀😀😀\ufffd\ufffd ok 日本\ufffd\ufffd"


def test_the_space_after_tokens_without_text_is_kept(with_fallback: Tokenizer) -> None:
    prompt, ids = (with_fallback.encode(t).ids for t in ("say hi</s></s></s></s>", " ab"))
    assert pushed(with_fallback.decode, prompt, ids, 1) == " ab"
