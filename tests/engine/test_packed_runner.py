"""Models of other architectures in one row, against Transformers and against themselves alone."""

import time
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from engine.engine import Engine, Generation, GenerationError
from engine.generic_runner import GenericRunner
from engine.loading import LoadedModel
from engine.packed_runner import PackedRunner
from engine.row_model import UnsuitedError
from engine.sampling import SamplingParams
from engine.scheduler import CHUNK, Chunk, Plan
from engine.sequence import Status
from tests.engine.architectures import ONE_BY_ONE, PACKED, random_model
from tests.engine.conftest import (
    assert_same_bits_beside_others,
    greedy,
    limits,
    made,
    mixed_prompts,
    prefilled,
    with_model,
)


def run(engine: Engine, prompt: list[int], params: SamplingParams) -> Generation:
    generation = engine.admit(prompt, params)
    generation.start()
    return generation


def wait_until_empty(engine: Engine) -> None:
    deadline = time.monotonic() + 20
    while engine.used_slots or engine.running or engine.waiting:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def assert_texts_of_transformers(
    engine: Engine, model: Any, prompts: list[list[int]], new: int
) -> None:
    """Greedy ones, all at once."""
    generations = [run(engine, prompt, greedy(new)) for prompt in prompts]
    for prompt, generation in zip(prompts, generations, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False
        )
        assert [*prompt, *generation.result(60).token_ids] == expected[0].tolist()


@pytest.fixture
def engine(loaded: LoadedModel) -> Iterator[Engine]:
    engine = Engine(with_model(loaded, random_model(PACKED["llama"])))
    assert isinstance(engine.runner, PackedRunner)
    yield engine
    engine.close(10)


@pytest.mark.parametrize("name", PACKED)
def test_greedy_text_of_prompts_at_once_is_that_of_transformers_token_for_token(
    name: str, loaded: LoadedModel
) -> None:
    model = random_model(PACKED[name])
    untouched = deepcopy(model)
    engine = Engine(with_model(loaded, model))
    assert isinstance(engine.runner, PackedRunner)
    prompts = [loaded.encode(p)[:200] for p in mixed_prompts(8)]
    assert_texts_of_transformers(engine, untouched, prompts, 20)
    wait_until_empty(engine)
    engine.close(10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PACKED)
@torch.inference_mode()
def test_a_sequences_bits_do_not_depend_on_what_else_a_step_computes(
    name: str, dtype: torch.dtype
) -> None:
    model = random_model(PACKED[name], dtype)
    alone, busy = PackedRunner(deepcopy(model), limits(256)), PackedRunner(model, limits(256))
    assert alone.reproducible
    assert_same_bits_beside_others(alone, busy, others=7, tokens=32)


@torch.inference_mode()
def test_a_prompt_that_begins_like_an_earlier_one_is_not_computed_anew() -> None:
    runner = PackedRunner(random_model(PACKED["llama"]), limits(256, prefix_bytes=1 << 24))
    first, again = made(200, 1), made(200, 1)
    expected = prefilled(runner, first)
    assert runner.reuse(made(200, 2)) == 0
    first.status = Status.FINISHED
    runner.free(first)
    assert runner.reuse(again) == 192
    assert torch.equal(runner.forward(Plan((), (Chunk(again, 192, 200),)))[0], expected)
    runner.free(again)
    assert runner.used == 0


def test_cancelled_ones_leave_no_slot_and_do_not_change_the_others(engine: Engine) -> None:
    prompts = [engine.loaded.encode(p) for p in mixed_prompts(9)]
    alone = [run(engine, p, SamplingParams(30, seed=3)).result(30) for p in prompts[::3]]
    crowd = [run(engine, p, SamplingParams(30, seed=3)) for p in prompts]
    while len(crowd[0].snapshot().token_ids) < 3:
        time.sleep(0.001)
    for index, generation in enumerate(crowd):
        if index % 3:
            generation.cancel()
    assert [generation.result(30) for generation in crowd[::3]] == alone
    wait_until_empty(engine)


class ChoosesFatal:
    """A real runner after which one prompt's second token is the given one."""

    def __init__(self, runner: Any, prompt: list[int], token: int) -> None:
        self.runner, self.prompt, self.token = runner, tuple(prompt), token

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def forward(self, plan: Plan) -> torch.Tensor:
        logits: torch.Tensor = self.runner.forward(plan)
        for row, sequence in enumerate(plan.sampled):
            if sequence.prompt_ids == self.prompt and len(sequence.output_ids) == 1:
                logits[row, self.token] = 1e6
        return logits


def test_one_whose_numbers_are_not_finite_fails_alone_and_leaves_nothing(engine: Engine) -> None:
    prompts = [engine.loaded.encode(p) for p in mixed_prompts(6)]
    expected = [run(engine, p, greedy(12)).result(30) for p in prompts]
    fatal = 4095
    ill, sound = list(made(40, 1).prompt_ids), list(made(35, 2).prompt_ids)  # of one arena
    successor = run(engine, sound, greedy(4)).result(30)
    wait_until_empty(engine)
    engine.loaded.model.model.embed_tokens.weight.data[fatal] = torch.nan
    engine.runner = ChoosesFatal(engine.runner, ill, fatal)
    crowd = [run(engine, p, greedy(12)) for p in prompts[:3]]
    sick = run(engine, ill, greedy(12))
    crowd += [run(engine, p, greedy(12)) for p in prompts[3:]]
    with pytest.raises(GenerationError):
        sick.result(30)
    assert sick.snapshot().token_ids[-1] == fatal
    assert [generation.result(30) for generation in crowd] == expected
    wait_until_empty(engine)
    with pytest.raises(GenerationError):
        run(engine, ill, greedy(12)).result(30)
    wait_until_empty(engine)
    assert run(engine, sound, greedy(4)).result(30) == successor  # in its row


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_what_cannot_share_a_row_runs_one_by_one_and_says_so(
    name: str, loaded: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    config, reason = ONE_BY_ONE[name]
    model = random_model(config)
    engine = Engine(with_model(loaded, model))
    assert isinstance(engine.runner, GenericRunner)
    assert f"one sequence at a time: {reason}" in caplog.text
    prompts = [list(made(tokens, tokens).prompt_ids) for tokens in (3, 30, 80)]
    assert_texts_of_transformers(engine, model, prompts, 8)
    engine.close(10)


def mixes_its_rows(module: Any, given: Any, out: torch.Tensor) -> torch.Tensor:
    return out + 0.1 * out.mean(dim=1, keepdim=True)


def rounds_otherwise_for_odd_rows(module: Any, given: Any, out: torch.Tensor) -> torch.Tensor:
    return out * (1 + 1e-6 * (out.shape[1] % 2))


def rounds_otherwise_for_more_rows(module: Any, given: Any, out: torch.Tensor) -> torch.Tensor:
    return out * (1 + 1e-7 * out.shape[1])


def test_a_model_that_mixes_its_rows_is_refused() -> None:
    model = random_model(PACKED["llama"])
    model.model.layers[1].mlp.register_forward_hook(mixes_its_rows)
    with pytest.raises(UnsuitedError, match="differ"):
        PackedRunner(model, limits(256))


def test_a_layer_that_sees_some_of_the_rows_is_refused() -> None:
    model = random_model(PACKED["llama"])
    mlp = model.model.layers[0].mlp
    whole = mlp.forward
    mlp.forward = lambda x: torch.cat([whole(x[:, :1]), whole(x[:, 1:])], dim=1)
    with pytest.raises(UnsuitedError, match="Linear sees some of the rows"):
        PackedRunner(model, limits(256))


def test_attention_with_an_argument_that_is_not_known_is_refused() -> None:
    model = random_model(PACKED["llama"])
    attention = model.model.layers[1].self_attn
    attention.forward = partial(attention.forward, s_aux=torch.ones(4))
    with pytest.raises(UnsuitedError, match="s_aux"):
        PackedRunner(model, limits(256))


def test_a_first_layer_that_rounds_otherwise_for_some_row_counts_is_not_run_with_those() -> None:
    model = random_model(PACKED["llama"])
    model.model.layers[0].mlp.register_forward_hook(rounds_otherwise_for_odd_rows)
    runner = PackedRunner(model, limits(256))
    assert all(count % 2 == 0 for count in runner.rows.counts)
    assert runner.reproducible


def test_a_later_layer_that_rounds_otherwise_beside_others_is_refused() -> None:
    model = random_model(PACKED["llama"])
    model.model.layers[1].mlp.register_forward_hook(rounds_otherwise_for_more_rows)
    with pytest.raises(UnsuitedError, match="depend on what else a step computes"):
        PackedRunner(model, limits(256))


def test_the_model_stays_as_it_was_for_whoever_else_calls_it() -> None:
    model = random_model(PACKED["mistral"])
    ids = torch.arange(40)[None]
    before, attention = model(ids).logits, model.config._attn_implementation
    runner = PackedRunner(model, limits(256))
    prefilled(runner, made(10, 1))
    assert model.config._attn_implementation == attention
    torch.testing.assert_close(model(ids).logits, before, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("packs", [True, False])
def test_weights_are_not_kept_twice(packs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not packs:
        monkeypatch.setattr("engine.linear.can_pack", lambda *_: False)
    model = random_model(PACKED["llama"])
    PackedRunner(model, limits(256))
    kept = {name for name, weight in model.named_parameters() if weight.dim() > 1}
    assert kept == {"model.embed_tokens.weight"}


@torch.inference_mode()
def test_where_nothing_is_packed_no_call_has_more_rows_than_were_measured_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = F.linear

    def sums_otherwise_for_many_rows(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if x.numel() <= 100 * x.shape[-1]:
            return plain(x, weight, bias)
        return plain(x.flip(-1), weight.flip(-1), bias)

    monkeypatch.setattr("engine.linear.can_pack", lambda *_: False)
    monkeypatch.setattr(F, "linear", sums_otherwise_for_many_rows)
    runner = PackedRunner(random_model(PACKED["llama"]), limits(256))
    company = [made(5 + i, i) for i in range(30)]
    for sequence in company:
        prefilled(runner, sequence)
        sequence.output_ids.append(3)
    chunks = tuple(Chunk(made(CHUNK, 50 + i), 0, CHUNK) for i in range(2))
    plan = Plan(tuple(company), chunks)
    assert runner.reproducible
    together = runner.forward(plan)
    assert torch.equal(together, torch.cat([runner.forward(part) for part in plan.apart()]))
