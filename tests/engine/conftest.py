"""The bundled model, loaded once, and requests of mixed length for it."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel

from engine.engine import Engine
from engine.loading import LoadedModel, load_model
from engine.ragged import Limits
from engine.runner import Runner
from engine.sampling import SamplingParams
from engine.scheduler import CHUNK, Chunk, Plan
from engine.sequence import Sequence

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "weights" / "tiny-gpt2")

WORDS = [
    "once",
    "upon",
    "a",
    "time",
    "the",
    "king",
    "had",
    "three",
    "daughters",
    "and",
    "an",
    "old",
]


@pytest.fixture(scope="session")
def loaded() -> LoadedModel:
    return load_model(TINY, "float32", "cpu")


@pytest.fixture(scope="session")
def loaded_bfloat16() -> LoadedModel:
    return load_model(TINY, "bfloat16", "cpu")


@pytest.fixture
def engine(loaded: LoadedModel) -> Iterator[Engine]:
    engine = Engine(loaded)
    yield engine
    engine.close(10)


def greedy(max_new_tokens: int, repetition_penalty: float = 1.0) -> SamplingParams:
    return SamplingParams(
        max_new_tokens, seed=0, temperature=0.0, repetition_penalty=repetition_penalty
    )


def mixed_prompts(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    rng = random.Random(seed)
    return [
        " ".join(rng.choices(WORDS, k=rng.randint(1, longest))).capitalize() for _ in range(count)
    ]


def sequence(
    prompt: list[int], params: SamplingParams, output: list[int] | None = None
) -> Sequence:
    made = Sequence(tuple(prompt), params)
    made.output_ids += output or []
    return made


def limits(context_size: int = 1024, prefix_bytes: int = 0) -> Limits:
    return Limits(context_size, max_running=32, prefill_tokens=2 * CHUNK, prefix_bytes=prefix_bytes)


def made(tokens: int, seed: int, vocabulary: int = 4096) -> Sequence:
    ids = torch.randint(1, vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed))
    return Sequence(tuple(ids.tolist()), SamplingParams(9, seed=0))


def prefilled(runner: Runner, sequence: Sequence) -> Tensor:
    """The logits after its prompt, which is run chunk by chunk."""
    prompt = len(sequence.prompt_ids)
    for start in range(0, prompt, CHUNK):
        chunk = Chunk(sequence, start, min(start + CHUNK, prompt))
        logits = runner.forward(Plan((), (chunk,)))
    return logits[0].clone()


def assert_same_bits_beside_others(alone: Runner, busy: Runner, others: int, tokens: int) -> None:
    """One prompt and so many tokens, by itself and among others; all are freed afterwards."""
    company = [made(5 + 9 * i, i) for i in range(others)]
    for sequence in company:
        prefilled(busy, sequence)
        sequence.output_ids.append(3)
    mine, again, late = made(70, 99), made(70, 99), made(CHUNK, 5)
    for start, stop in ((0, 64), (64, 70)):
        expected = alone.forward(Plan((), (Chunk(mine, start, stop),)))
        chunks = (Chunk(late, 0, CHUNK), Chunk(again, start, stop))[start > 0 :]
        got = busy.forward(Plan(tuple(company), chunks))
    assert torch.equal(got[-1], expected[0])
    for token in range(tokens):
        mine.output_ids.append(token)
        again.output_ids.append(token)
        expected = alone.forward(Plan((mine,), ()))
        place = token % (others + 1)
        members = (*company[:place], again, *company[place:])
        got = busy.forward(Plan(members, ()))
        assert torch.equal(got[place], expected[0]), token
    for sequence in (*company, again, late, mine):
        busy.free(sequence)
        alone.free(sequence)
    assert busy.used == alone.used == 0


def with_model(loaded: LoadedModel, model: Any) -> LoadedModel:
    """Another architecture in the bundled model's place, with its tokenizer."""
    pipeline: Any = SimpleNamespace(model=model, tokenizer=loaded.tokenizer)
    return replace(loaded, pipeline=pipeline, context_size=256, end_ids=frozenset())


def random_gpt2(**changes: object) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes: dict[str, object] = dict(n_layer=2, n_embd=64, n_head=4, vocab_size=300, n_positions=128)
    return GPT2LMHeadModel(GPT2Config(**(sizes | changes))).eval()
