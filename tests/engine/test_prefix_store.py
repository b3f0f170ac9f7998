"""What earlier prompts computed is used again, and changes no text."""

from typing import Any

import pytest
import torch

from engine.engine import Engine
from engine.loading import LoadedModel
from engine.prefix_store import PrefixStore
from engine.sampling import Completion, SamplingParams
from engine.scheduler import CHUNK

SHAPE = (2, 1, 1, 4 * CHUNK, 8)
CHUNK_BYTES = 2 * CHUNK * 8 * 4


def computed(value: float = 1.0) -> torch.Tensor:
    return torch.full(SHAPE, value)


def answer(engine: Engine, ids: list[int], **options: Any) -> Completion:
    with engine.admit(ids, SamplingParams(24, seed=5, **options)) as generation:
        generation.start()
        return generation.result(60)


def story(loaded: LoadedModel, tokens: int) -> list[int]:
    text = "The king had three daughters, and the youngest of them went into the wood. " * 40
    return loaded.encode(text)[:tokens]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {}], ids=["greedy", "sampled"])
def test_texts_are_the_same_with_and_without_reuse(
    dtype: str, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    loaded = request.getfixturevalue("loaded" if dtype == "float32" else "loaded_bfloat16")
    long = story(loaded, 300)
    prompts = [long[:length] for length in (300, 300, 200, 128, 129, 64, 65, 290)]
    with_store, without = Engine(loaded), Engine(loaded, prefix_bytes=0)
    try:
        expected = [answer(without, ids, **options) for ids in prompts]
        assert [answer(with_store, ids, **options) for ids in prompts] == expected
        assert with_store.reused_tokens == 256 + 192 + 64 + 128 + 64 + 256
        assert without.reused_tokens == 0
    finally:
        with_store.close(10)
        without.close(10)


def test_a_prompt_that_goes_on_reuses_its_beginning_beside_others(loaded: LoadedModel) -> None:
    long = story(loaded, 500)
    engine = Engine(loaded)
    try:
        answer(engine, long[:250])
        params = SamplingParams(24, seed=5)
        crowd = [engine.admit(long[: 260 + 10 * n], params) for n in range(8)]
        for generation in crowd:
            generation.start()
        texts = [generation.result(60) for generation in crowd]
        assert engine.reused_tokens >= 8 * 192
        fresh = Engine(loaded, prefix_bytes=0)
        expected = [answer(fresh, long[: 260 + 10 * n]) for n in range(8)]
        fresh.close(10)
        assert texts == expected
        assert engine.used_slots == 0
    finally:
        engine.close(10)


def test_only_a_common_beginning_is_found() -> None:
    store = PrefixStore(1 << 20)
    ids = list(range(4 * CHUNK))
    store.keep(ids, computed())
    assert len(store.find([*ids, 1])) == 4
    assert len(store.find(ids)) == 3  # one token is left to compute
    assert len(store.find([*ids[: 2 * CHUNK], 9, *ids[2 * CHUNK + 1 :]])) == 2
    assert store.find([9, *ids[1:]]) == []


def test_the_store_keeps_within_its_budget_and_drops_what_was_used_longest_ago() -> None:
    store = PrefixStore(6 * CHUNK_BYTES)
    first, second = list(range(4 * CHUNK)), list(range(1000, 1000 + 2 * CHUNK))
    store.keep(first, computed())
    store.keep(second, computed()[..., : 2 * CHUNK, :])
    assert len(store.find([*first, 1])) == 4
    store.keep(list(range(2000, 2000 + 2 * CHUNK)), computed())
    assert store.bytes == 6 * CHUNK_BYTES
    assert store.find([*second, 1]) == []
    assert len(store.find([*first, 1])) == 4


def test_of_a_prompt_its_end_goes_first() -> None:
    first, second = list(range(4 * CHUNK)), list(range(1000, 1000 + 2 * CHUNK))
    store = PrefixStore(4 * CHUNK_BYTES)
    store.keep(first, computed())
    store.keep(second, computed()[..., : 2 * CHUNK, :])
    assert len(store.find([*second, 1])) == 2
    assert len(store.find([*first, 1])) == 2  # and what is found is used, so that second's end goes
    store.keep([9] * CHUNK, computed())
    assert (len(store.find([*first, 1])), len(store.find([*second, 1]))) == (2, 1)


def test_of_a_prompt_larger_than_the_store_the_beginning_is_kept() -> None:
    ids = list(range(4 * CHUNK))
    store = PrefixStore(3 * CHUNK_BYTES + 1)
    for _ in range(2):
        store.keep(ids, computed())
        assert store.bytes == 3 * CHUNK_BYTES
        assert len(store.find([*ids, 1])) == 3


def test_what_is_not_finite_is_not_kept() -> None:
    store = PrefixStore(1 << 20)
    broken = computed()
    broken[0, 0, 0, CHUNK + 3, 2] = float("nan")
    ids = list(range(4 * CHUNK))
    store.keep(ids, broken)
    assert len(store.find([*ids, 1])) == 1


def test_a_store_without_budget_keeps_nothing() -> None:
    store = PrefixStore(0)
    store.keep(list(range(4 * CHUNK)), computed())
    assert store.chunks == {}
