"""Models that have no runner of their own, through the whole engine."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM

from engine.engine import Engine
from engine.generic_runner import GenericRunner
from engine.loading import LoadedModel
from engine.sampling import SamplingParams
from tests.engine.conftest import greedy, mixed_prompts

SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}


def with_model(loaded: LoadedModel, model: Any) -> LoadedModel:
    pipeline: Any = SimpleNamespace(model=model.eval(), tokenizer=loaded.tokenizer)
    return replace(loaded, pipeline=pipeline, context_size=256, end_ids=frozenset())


@pytest.fixture(params=["llama", "qwen2"])
def other(request: pytest.FixtureRequest, loaded: LoadedModel) -> LoadedModel:
    torch.manual_seed(0)
    if request.param == "llama":
        return with_model(loaded, LlamaForCausalLM(LlamaConfig(**SIZES)))
    return with_model(loaded, Qwen2ForCausalLM(Qwen2Config(**SIZES)))


def test_greedy_text_is_that_of_transformers_with_mixed_prompts_at_once(
    other: LoadedModel,
) -> None:
    engine = Engine(other)
    assert isinstance(engine.runner, GenericRunner)
    prompts = [other.encode(p)[:200] for p in mixed_prompts(8)]
    generations = [engine.admit(p, greedy(20)) for p in prompts]
    for generation in generations:
        generation.start()
    for prompt, generation in zip(prompts, generations, strict=True):
        ids = torch.tensor([prompt])
        expected = other.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False
        )
        assert [*prompt, *generation.result(60).token_ids] == expected[0].tolist()
    engine.close(10)
    assert engine.used_slots == 0


def test_the_same_seed_gives_the_same_text_alone_and_beside_others(other: LoadedModel) -> None:
    engine = Engine(other)
    params = SamplingParams(20, seed=5)
    prompt = other.encode("Once upon a time")
    with engine.admit(prompt, params) as generation:
        generation.start()
        alone = generation.result(60)
    crowd = [engine.admit(other.encode(p), SamplingParams(20, seed=1)) for p in mixed_prompts(6)]
    crowd.insert(3, engine.admit(prompt, params))
    for generation in crowd:
        generation.start()
    assert crowd[3].result(60) == alone
    engine.close(10)
