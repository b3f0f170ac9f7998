"""The bundled model, loaded once, and requests of mixed length for it."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel

from engine.engine import Engine
from engine.loading import LoadedModel, load_model
from engine.sampling import SamplingParams
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


def random_gpt2(**changes: object) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes: dict[str, object] = dict(n_layer=2, n_embd=64, n_head=4, vocab_size=300, n_positions=128)
    return GPT2LMHeadModel(GPT2Config(**(sizes | changes))).eval()
