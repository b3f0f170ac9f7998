"""GPT-2 batched against Transformers' own GPT-2, and against itself with other batches."""

import pytest
import torch
from torch import Tensor

from engine.gpt2_runner import GPT2Runner
from engine.loading import LoadedModel
from engine.ragged import Limits
from engine.scheduler import CHUNK, Chunk, Plan
from engine.sequence import Sequence, Status
from tests.engine.conftest import (
    assert_same_bits_beside_others,
    limits,
    made,
    prefilled,
    random_gpt2,
)


def runner_of(model: torch.nn.Module, prefix_bytes: int = 0) -> GPT2Runner:
    return GPT2Runner(model, limits(prefix_bytes=prefix_bytes))


def reference(model: torch.nn.Module, sequence: Sequence) -> Tensor:
    ids = torch.tensor([[*sequence.prompt_ids, *sequence.output_ids]])
    with torch.inference_mode():
        return model(ids).logits[0, -1]  # type: ignore[no-any-return]


@torch.inference_mode()
def test_logits_are_those_of_transformers_at_every_length(loaded: LoadedModel) -> None:
    runner = runner_of(loaded.model)
    sequences = [made(tokens, tokens) for tokens in (1, 2, 40, 63, 64, 65, 130, 300, 1000)]
    for sequence in sequences:
        torch.testing.assert_close(
            prefilled(runner, sequence), reference(loaded.model, sequence), atol=2e-3, rtol=1e-4
        )
    for step in range(4):
        for sequence in sequences:
            sequence.output_ids.append(7 + step)
        logits = runner.forward(Plan(tuple(sequences), ()))
        for row, sequence in zip(logits, sequences, strict=True):
            torch.testing.assert_close(row, reference(loaded.model, sequence), atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.inference_mode()
def test_a_sequences_bits_do_not_depend_on_what_else_a_step_computes(
    dtype: str, request: pytest.FixtureRequest
) -> None:
    name = "loaded" if dtype == "float32" else "loaded_bfloat16"
    model = request.getfixturevalue(name).model
    alone, busy = runner_of(model), runner_of(model)
    assert alone.reproducible
    for others in (1, 6, 31):
        assert_same_bits_beside_others(alone, busy, others, tokens=66)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_step_is_not_padded_to_a_large_one(dtype: torch.dtype) -> None:
    # Matrix units sum in another order for many rows than for few, at this size of a product.
    model = random_gpt2(n_layer=1, n_embd=768, n_head=12).to(dtype)
    runner = GPT2Runner(model, Limits(128, max_running=64, prefill_tokens=256, prefix_bytes=0))
    assert runner.reproducible
    assert runner.rows.pad(1) <= CHUNK
    assert runner.rows.pad(150) < 2 * 150


@torch.inference_mode()
def test_part_of_a_step_run_again_gives_the_same(loaded: LoadedModel) -> None:
    runner = runner_of(loaded.model)
    sequences = [made(10 + i, i) for i in range(5)]
    for sequence in sequences:
        prefilled(runner, sequence)
        sequence.output_ids.append(3)
    plan = Plan(tuple(sequences), ())
    whole = runner.forward(plan)
    parts = [runner.forward(part)[0] for part in plan.apart()]
    assert torch.equal(whole, torch.stack(parts))
    assert torch.equal(whole[[1, 3]], runner.forward(Plan((sequences[1], sequences[3]), ())))


def kept(runner: GPT2Runner) -> tuple[int, int, int]:
    """Sequences, rows of the cache, and chunks of earlier prompts."""
    rows = sum(len(arena.sequences) for arena in runner.cache.arenas)
    return runner.used, rows, len(runner.prefixes.chunks)


@torch.inference_mode()
def test_a_step_that_raises_half_way_keeps_nothing_and_can_be_run_again(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean, runner = runner_of(loaded.model), runner_of(loaded.model, 1 << 30)
    old, new = made(10, 1), made(70, 2)
    for each in (clean, runner):
        for sequence in (old, new):
            each.forward(Plan((), (Chunk(sequence, 0, min(len(sequence), CHUNK)),)))
    old.output_ids.append(3)
    plan = Plan((old,), (Chunk(new, CHUNK, 70),))
    expected = clean.forward(plan)
    with monkeypatch.context() as patch:
        patch.setattr(runner.blocks[-1], "down", None)
        with pytest.raises(AttributeError):
            runner.forward(plan)
    for _ in range(2):  # the sampler may raise too, when the forward pass is over
        assert torch.equal(runner.forward(plan), expected)
        assert kept(runner) == (2, 1, 0)
    parts = [runner.forward(part)[0] for part in plan.apart()]
    assert torch.equal(torch.stack(parts), expected)
    new.output_ids.append(4)
    plan = Plan((old, new), ())
    expected = clean.forward(plan)
    for _ in range(2):
        assert torch.equal(runner.forward(plan), expected)
        assert kept(runner) == (2, 2, 1)
    for sequence in (old, new):
        runner.free(sequence)
    assert kept(runner) == (0, 0, 1)


@pytest.mark.parametrize(
    ("status", "chunks"), [(Status.FINISHED, 2), (Status.CANCELLED, 0), (Status.FAILED, 0)]
)
@torch.inference_mode()
def test_a_prompt_whose_first_token_is_its_last_is_kept_if_it_is_sound(
    loaded: LoadedModel, status: Status, chunks: int
) -> None:
    runner = runner_of(loaded.model, 1 << 30)
    sequence = made(130, 1)
    prefilled(runner, sequence)
    sequence.status = status
    runner.free(sequence)
    assert kept(runner) == (0, 0, chunks)


@torch.inference_mode()
def test_nan_in_one_sequence_reaches_neither_its_neighbours_nor_its_successor() -> None:
    model = random_gpt2()
    clean, runner = runner_of(model), runner_of(model)
    neighbour, sick, successor = made(12, 1, 299), made(12, 2, 299), made(6, 3, 299)
    expected = []
    for sequence in (neighbour, successor):
        prefilled(clean, sequence)
        sequence.output_ids.append(1)
        expected.append(clean.forward(Plan((sequence,), ()))[0, :299])
    prefilled(runner, neighbour)
    prefilled(runner, sick)
    sick.output_ids.append(299)  # a chosen token: what it makes lies where decoding reads
    model.transformer.wte.weight[299] = torch.nan
    logits = runner.forward(Plan((neighbour, sick), ()))[:, :299]
    assert torch.equal(logits[0], expected[0])
    assert logits[1].isnan().all()
    _, row = runner.cache.places[sick]
    runner.free(sick, tainted=True)
    prefilled(runner, successor)
    logits = runner.forward(Plan((neighbour, successor), ()))[:, :299]
    assert runner.cache.places[successor][1] == row
    assert torch.equal(logits, torch.stack(expected))


def test_gpt2_with_options_that_it_does_not_compute_is_left_to_the_generic_runner() -> None:
    assert GPT2Runner.takes(random_gpt2())
    assert not GPT2Runner.takes(random_gpt2(activation_function="relu"))
    assert not GPT2Runner.takes(random_gpt2(scale_attn_by_inverse_layer_idx=True))
    assert not GPT2Runner.takes(torch.nn.Linear(1, 1))
