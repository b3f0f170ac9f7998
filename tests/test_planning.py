"""What of a thread a reply reads: as many of its latest turns as the model's context holds."""

import random
from collections.abc import Sequence
from dataclasses import fields

import pytest

from engine.loading import LoadedModel, load_model
from services.planning import Turn, fit_thread
from tests.service import TINY

TEMPLATE = (
    "{{ '<s>A polite assistant.</s>\n' }}{% for said in messages %}"
    "<{{ said['role'] }}> {{ said['content'] | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
PIECES = [" king", "the", "\n", "  ", " \n\n", ".", "龍", "🐉", "User:", " 12", "é", "'s", "\t"]


class CountingModel(LoadedModel):
    """The bundled model; ``read`` are the characters that it was given to encode."""

    read = 0

    def encode(self, text: str) -> list[int]:
        CountingModel.read += len(text)
        return super().encode(text)


@pytest.fixture(scope="module")
def model() -> CountingModel:
    loaded = load_model(TINY, "float32", "cpu")
    return CountingModel(**{field.name: getattr(loaded, field.name) for field in fields(loaded)})


def longest_that_fits(
    model: LoadedModel, thread: Sequence[Turn], prompt: str, room: int
) -> list[int]:
    """What is meant: the oldest turn is left out until it fits."""
    for first in range(len(thread)):
        ids, _ = model.encode_thread(thread[first:], prompt)
        if len(ids) + room <= model.context_size:
            return ids
    return model.encode_thread([], prompt)[0]


def some_text(draw: random.Random, pieces: int) -> str:
    return "".join(draw.choice(PIECES) for _ in range(draw.randrange(pieces)))


@pytest.mark.parametrize("template", [None, TEMPLATE])
@pytest.mark.parametrize("pieces", [4, 60, 300])
def test_the_most_turns_that_fit_are_read(
    model: CountingModel, template: str | None, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    draw = random.Random(pieces)
    for _ in range(8):
        thread = [
            (some_text(draw, pieces), some_text(draw, pieces)) for _ in range(draw.randrange(40))
        ]
        prompt, room = some_text(draw, 60), draw.randrange(1, 500)
        expected = longest_that_fits(model, thread, prompt, room)
        assert fit_thread(model, thread, prompt, room) == expected


def test_a_long_thread_is_not_encoded_again_for_each_turn_that_is_left_out(
    model: CountingModel,
) -> None:
    said = "the king went home " * 25
    CountingModel.read = 0
    ids = fit_thread(model, [(said, said)] * 200, "And then?", 50)
    assert 500 < len(ids) <= model.context_size - 50
    assert CountingModel.read < 50 * len(said)  # of 400 such texts
