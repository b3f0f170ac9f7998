"""The engine as its callers see it, on the real model."""

import os
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.engine import (
    NICE,
    Engine,
    EngineFullError,
    EngineStoppedError,
    Generation,
    GenerationError,
    StepOutput,
)
from engine.loading import LoadedModel
from engine.prefix_store import PrefixStore
from engine.sampling import Completion, FinishReason, SamplingParams
from engine.scheduler import Plan
from engine.sequence import Sequence
from tests.engine.conftest import greedy, made, mixed_prompts

LONG = SamplingParams(900, seed=1, temperature=1.0, top_k=0)


def run(engine: Engine, prompt: str, params: SamplingParams) -> Generation:
    generation = engine.admit(engine.loaded.encode(prompt), params)
    generation.start()
    return generation


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def empty(engine: Engine) -> bool:
    return engine.used_slots == engine.running == engine.waiting == 0


def of_transformers(
    loaded: LoadedModel, prompt: str, new: int, repetition_penalty: float
) -> list[int]:
    ids = torch.tensor([loaded.encode(prompt)])
    out = loaded.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        repetition_penalty=repetition_penalty,
        pad_token_id=0,
    )
    new_ids: list[int] = out[0, ids.shape[1] :].tolist()
    end = next((i for i, token in enumerate(new_ids) if token in loaded.end_ids), len(new_ids))
    return new_ids[:end]


@pytest.mark.parametrize("penalty", [1.0, 1.15])
def test_greedy_text_of_mixed_prompts_is_that_of_transformers_token_for_token(
    loaded: LoadedModel, engine: Engine, penalty: float
) -> None:
    prompts = mixed_prompts(40) + mixed_prompts(2, longest=900)
    generations = [run(engine, prompt, greedy(24, penalty)) for prompt in prompts]
    for prompt, generation in zip(prompts, generations, strict=True):
        expected = of_transformers(loaded, prompt, 24, penalty)
        assert list(generation.result(60).token_ids) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_seed_gives_the_same_text_alone_and_beside_31_others(
    dtype: str, request: pytest.FixtureRequest
) -> None:
    engine = Engine(request.getfixturevalue("loaded" if dtype == "float32" else "loaded_bfloat16"))
    kinds: list[dict[str, Any]] = [{}, {"temperature": 0.0}, {"top_k": 0, "top_p": 0.9}]
    params = [SamplingParams(50, seed=i, **kinds[i % 3]) for i in range(32)]
    prompts = mixed_prompts(32, seed=4)
    alone = [run(engine, prompts[i], params[i]).result(60) for i in range(0, 32, 4)]
    crowd = [run(engine, *both) for both in zip(prompts, params, strict=True)]
    assert [crowd[i].result(60) for i in range(0, 32, 4)] == alone
    engine.close(10)


def test_text_is_what_the_pipeline_holds_after_the_prompt(
    loaded: LoadedModel, engine: Engine
) -> None:
    prompt = "Once upon a time there was"
    out = loaded.pipeline(prompt, max_new_tokens=30, do_sample=False)
    params = greedy(30, loaded.defaults.repetition_penalty)
    assert run(engine, prompt, params).result(20).text == out[0]["generated_text"][len(prompt) :]


def test_it_ends_at_the_end_token_which_is_not_part_of_it(engine: Engine) -> None:
    ends = [
        c
        for c in [run(engine, "The end.", SamplingParams(200, seed=s)) for s in range(32)]
        if c.result(60).finish_reason is FinishReason.STOP
    ]
    assert ends
    for generation in ends:
        completion = generation.result(0)
        assert len(completion.token_ids) < 200
        assert not engine.loaded.end_ids & set(completion.token_ids)


def test_it_stops_before_a_stop_string_and_streams_nothing_of_it(engine: Engine) -> None:
    whole = run(engine, "Once upon a time", greedy(30)).result(20).text
    stop = whole[25:32]
    params = SamplingParams(30, seed=0, temperature=0.0, stop=("never", stop))
    generation = engine.admit(engine.loaded.encode("Once upon a time"), params)
    generation.start()
    pieces = list(generation.pieces())
    completion = generation.result(20)
    assert completion.finish_reason is FinishReason.STOP
    assert completion.text == whole[: whole.index(stop)]
    assert "".join(text for _, text in pieces) == completion.text
    assert sum((ids for ids, _ in pieces), ()) == completion.token_ids


def test_pieces_join_to_the_result_for_many_streams_at_once(engine: Engine) -> None:
    streams: dict[int, list[tuple[tuple[int, ...], str]]] = {}
    generations = [run(engine, p, SamplingParams(40, seed=7)) for p in mixed_prompts(12)]

    def read(index: int) -> None:
        streams[index] = list(generations[index].pieces())

    threads = [threading.Thread(target=read, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for index, thread in enumerate(threads):
        thread.join(30)
        completion = generations[index].result(1)
        assert "".join(text for _, text in streams[index]) == completion.text
        assert sum((ids for ids, _ in streams[index]), ()) == completion.token_ids
        assert len(streams[index]) > 1


def test_subscribers_get_all_sequences_of_a_step_at_once_and_each_end_once(
    engine: Engine,
) -> None:
    steps: list[list[StepOutput]] = []
    end = engine.subscribe(steps.append)
    engine.subscribe(lambda _: 1 / 0)  # type: ignore[arg-type]
    generations = [run(engine, p, greedy(20)) for p in mixed_prompts(6)]
    results = {g: g.result(30) for g in generations}
    wait_until(lambda: sum(o.finish_reason is not None for s in steps for o in s) == 6)
    assert max(len(step) for step in steps) > 1
    for generation, completion in results.items():
        mine = [o for step in steps for o in step if o.generation is generation]
        assert sum((o.token_ids for o in mine), ()) == completion.token_ids
        assert [o.finish_reason for o in mine if o.finish_reason] == [completion.finish_reason]
    end()
    seen = len(steps)
    run(engine, "The", greedy(3)).result(10)
    assert len(steps) == seen


def test_a_cancelled_one_ends_at_once_with_what_it_has(engine: Engine) -> None:
    generation = run(engine, "The wolf", LONG)
    wait_until(lambda: len(generation.snapshot().token_ids) > 5)
    generation.cancel(FinishReason.DISCONNECTED)
    generation.cancel(FinishReason.CANCELLED)
    completion = generation.result(1)
    assert completion.finish_reason is FinishReason.DISCONNECTED
    assert 5 < len(completion.token_ids) < 900
    assert completion.text == engine.loaded.decode(list(completion.token_ids))
    wait_until(lambda: empty(engine))
    assert generation.result(1) == completion


def test_one_cancelled_before_it_ran_has_nothing(engine: Engine) -> None:
    with engine.admit([5, 6], LONG) as generation:
        assert engine.waiting == 1
    assert generation.result(1) == Completion((), "", FinishReason.CANCELLED)
    generation.start()
    assert empty(engine)


def test_a_snapshot_is_a_prefix_of_the_result(engine: Engine) -> None:
    generation = run(engine, "The king", SamplingParams(60, seed=2))
    snapshots = [generation.snapshot()]
    while snapshots[-1].finish_reason is None:
        time.sleep(0.001)
        snapshots.append(generation.snapshot())
    completion = generation.result(5)
    for snapshot in snapshots:
        assert completion.text.startswith(snapshot.text)
        assert completion.token_ids[: len(snapshot.token_ids)] == snapshot.token_ids


def test_the_queue_is_bounded_and_a_place_is_free_again_after_an_end(loaded: LoadedModel) -> None:
    engine = Engine(loaded, max_waiting=2, max_running=1)
    running = run(engine, "The", LONG)
    wait_until(lambda: engine.running == 1)
    waiting = [run(engine, "The", greedy(2)), engine.admit([1], greedy(2))]
    with pytest.raises(EngineFullError):
        engine.admit([1], greedy(2))
    waiting[1].cancel()
    late = run(engine, "The", greedy(2))
    running.cancel()
    assert waiting[0].result(10).finish_reason is FinishReason.LENGTH
    assert late.result(10).finish_reason is FinishReason.LENGTH
    engine.close(10)


def test_what_the_model_cannot_run_is_refused(engine: Engine) -> None:
    refused = [
        ([], greedy(5)),
        ([1] * 1000, greedy(25)),
        ([4096], greedy(5)),
        ([-1], greedy(5)),
        ([1], greedy(0)),
        ([1], SamplingParams(5, seed=0, temperature=-1.0)),
    ]
    for prompt, params in refused:
        with pytest.raises(ValueError):
            engine.admit(prompt, params)
    assert empty(engine)


def test_the_whole_context_can_be_used(loaded: LoadedModel) -> None:
    engine = Engine(replace(loaded, end_ids=frozenset()))
    generation = engine.admit([9] * 1000, greedy(24))
    generation.start()
    completion = generation.result(60)
    assert completion.finish_reason is FinishReason.LENGTH
    assert len(completion.token_ids) == 24
    engine.close(10)


def test_waiting_without_starting_is_a_mistake_and_waiting_too_long_a_timeout(
    engine: Engine,
) -> None:
    generation = engine.admit([1], LONG)
    with pytest.raises(RuntimeError):
        generation.result()
    generation.start()
    with pytest.raises(TimeoutError):
        generation.result(0.01)
    generation.cancel()


def test_closing_ends_everything_and_refuses_what_comes_later(loaded: LoadedModel) -> None:
    engine = Engine(loaded)
    running, admitted = run(engine, "The", LONG), engine.admit([1], LONG)
    wait_until(lambda: len(running.snapshot().token_ids) > 2)
    engine.close(10, FinishReason.INTERRUPTED)
    assert running.result(1).finish_reason is FinishReason.INTERRUPTED
    assert admitted.result(1).finish_reason is FinishReason.INTERRUPTED
    assert not engine.healthy
    assert engine.failure
    assert empty(engine)
    with pytest.raises(EngineStoppedError):
        engine.admit([1], LONG)
    engine.close(1)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priorities here")
@pytest.mark.parametrize("lowered", [0, NICE + 3])
def test_the_worker_gives_way_and_takes_no_more_than_the_operator_gave(
    loaded: LoadedModel, lowered: int
) -> None:
    before = min(19, os.getpriority(os.PRIO_PROCESS, 0) + lowered)
    found: list[int] = []

    def build() -> None:  # a new thread has the priority of the one that made it
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), before)
        engine = Engine(loaded)
        assert engine._worker.native_id is not None
        found.append(os.getpriority(os.PRIO_PROCESS, engine._worker.native_id))
        engine.close(10)

    builder = threading.Thread(target=build)
    builder.start()
    builder.join(60)
    assert found == [max(NICE, before)]


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priorities here")
def test_it_runs_where_priorities_may_not_be_changed(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "setpriority", refuse)
    engine = Engine(loaded)
    assert run(engine, "The", greedy(2)).result(10).token_ids
    engine.close(10)


class Sabotaged:
    """A real runner that fails where it is told to."""

    def __init__(self, runner: Any, spoil: Callable[[Plan, Tensor], Tensor]) -> None:
        self.runner, self.spoil = runner, spoil

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def forward(self, plan: Plan) -> Tensor:
        return self.spoil(plan, self.runner.forward(plan))


SICK = 1234


def sick(sequence: Sequence) -> bool:
    return sequence.prompt_ids[0] == SICK and len(sequence.output_ids) == 4


def nan_in_its_row(plan: Plan, logits: Tensor) -> Tensor:
    for row, sequence in enumerate(plan.sampled):
        if sick(sequence):
            logits[row] = torch.nan
    return logits


def error_with_it_in_the_step(plan: Plan, logits: Tensor) -> Tensor:
    if any(sick(sequence) for sequence in plan.sampled):
        raise ZeroDivisionError("secret prompt text")
    return logits


@pytest.mark.parametrize("spoil", [nan_in_its_row, error_with_it_in_the_step])
def test_one_that_fails_fails_alone(
    engine: Engine, spoil: Callable[[Plan, Tensor], Tensor]
) -> None:
    prompts = mixed_prompts(6)
    expected = [run(engine, p, SamplingParams(12, seed=3)).result(30) for p in prompts]
    engine.runner = Sabotaged(engine.runner, spoil)
    crowd = [engine.admit(engine.loaded.encode(p), SamplingParams(12, seed=3)) for p in prompts]
    failing = engine.admit([SICK, 7], SamplingParams(12, seed=3))
    for generation in (*crowd[:3], failing, *crowd[3:]):
        generation.start()
    with pytest.raises(GenerationError) as caught:
        failing.result(30)
    assert "secret" not in str(caught.value)
    assert len(failing.snapshot().token_ids) == 4
    assert failing.snapshot().finish_reason is FinishReason.ERROR
    assert [generation.result(30) for generation in crowd] == expected
    assert engine.healthy
    wait_until(lambda: empty(engine))


def test_a_step_that_raised_after_a_long_prompt_costs_the_others_nothing(
    loaded: LoadedModel,
) -> None:
    prompts = [loaded.encode(p)[:130] for p in mixed_prompts(8, longest=200)]
    raised: list[Plan] = []

    def error_when_a_long_prompt_ends(plan: Plan, logits: Tensor) -> Tensor:
        if len(plan.sequences) > 1 and any(c.ends_prompt and c.start for c in plan.prefill):
            raised.append(plan)
            raise ZeroDivisionError
        return logits

    def answers(engine: Engine) -> list[Completion]:
        generations = [engine.admit(p, SamplingParams(12, seed=3)) for p in prompts]
        for generation in generations:
            generation.start()
        return [generation.result(30) for generation in generations]

    clean, engine = Engine(loaded), Engine(loaded)
    clean_store, store = clean.runner.prefixes, engine.runner.prefixes  # type: ignore[attr-defined]
    arenas = engine.runner.cache.arenas  # type: ignore[attr-defined]
    engine.runner = Sabotaged(engine.runner, error_when_a_long_prompt_ends)
    assert answers(engine) == answers(clean)
    assert raised
    wait_until(lambda: empty(engine))
    assert [arena for arena in arenas if arena.sequences] == []
    assert store.chunks.keys() == clean_store.chunks.keys()
    assert all(torch.equal(chunk, clean_store.chunks[key]) for key, chunk in store.chunks.items())
    for each in (clean, engine):
        each.close(10)


class KnowsFewTokens(LoadedModel):
    """A tokenizer that has no text for some of the model's ids, as slow ones may have none."""

    def decode(self, ids: list[int]) -> str:
        if max(ids) > 4000:
            raise IndexError("piece id is out of range")
        return super().decode(ids)


def test_one_whose_token_has_no_text_fails_alone(loaded: LoadedModel) -> None:
    engine = Engine(KnowsFewTokens(**vars(loaded)))
    other = run(engine, "The", LONG)
    params = SamplingParams(900, seed=1, temperature=3.0, top_k=0, stop=("no such text",))
    failing = run(engine, "The", params)
    with pytest.raises(GenerationError, match="IndexError"):
        failing.result(30)
    assert failing.snapshot().text == engine.loaded.decode(list(failing.snapshot().token_ids))
    wait_until(lambda: len(other.snapshot().token_ids) > 50)
    assert engine.healthy
    other.cancel()
    wait_until(lambda: empty(engine))
    engine.close(10)


@pytest.mark.parametrize("new", [1, 9])  # kept when it ends, or when it decodes first
def test_a_prompt_that_cannot_be_kept_for_later_ones_costs_nobody_anything(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, new: int
) -> None:
    refused: list[bool] = []

    def no_room(*_: object) -> None:
        refused.append(True)
        raise torch.OutOfMemoryError("CUDA out of memory")

    prompt = engine.loaded.decode(list(made(130, 1).prompt_ids))
    expected = run(engine, prompt, greedy(new)).result(30)
    store: PrefixStore = engine.runner.prefixes  # type: ignore[attr-defined]
    run(engine, "Once", greedy(1)).result(30)  # it begins after the prompt was kept
    assert store.chunks
    store.chunks.clear()
    monkeypatch.setattr(store, "keep", no_room)
    assert run(engine, prompt, greedy(new)).result(30) == expected
    wait_until(lambda: refused)
    assert run(engine, prompt, greedy(new)).result(30) == expected
    assert engine.healthy


def test_a_worker_that_dies_tells_everybody_at_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    generations = [run(engine, p, LONG) for p in mixed_prompts(3)]
    admitted = engine.admit([1], LONG)
    wait_until(lambda: engine.running == 3)

    def breaks(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(engine.scheduler, "schedule", breaks)
    for generation in generations:
        with pytest.raises(EngineStoppedError, match="MemoryError"):
            generation.result(5)
        with pytest.raises(EngineStoppedError):
            list(generation.pieces())
    with pytest.raises(EngineStoppedError):
        admitted.start()
    with pytest.raises(EngineStoppedError):
        engine.admit([1], LONG)
    assert not engine.healthy
    assert engine.failure == "the inference worker died (MemoryError)"


def test_it_stops_when_its_device_is_lost(engine: Engine) -> None:
    def lost(plan: Plan, logits: Tensor) -> Tensor:
        if len(plan.sequences) > 1:
            raise RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED")  # what a library makes of it
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    generations = [run(engine, p, LONG) for p in mixed_prompts(3)]
    wait_until(lambda: engine.running == 3)
    engine.runner = Sabotaged(engine.runner, lost)
    for generation in generations:
        with pytest.raises(EngineStoppedError, match="AcceleratorError"):
            generation.result(5)
    assert not engine.healthy


def test_callers_are_not_held_up_while_a_finished_ones_memory_is_freed(engine: Engine) -> None:
    reached, release = threading.Event(), threading.Event()

    class SlowToFree(Sabotaged):
        def free(self, sequence: Sequence, *, tainted: bool = False) -> None:
            reached.set()
            release.wait(20)
            self.runner.free(sequence, tainted=tainted)

    engine.runner = SlowToFree(engine.runner, lambda plan, logits: logits)
    run(engine, "The", greedy(2))
    assert reached.wait(20)
    admitting = threading.Thread(target=lambda: engine.admit([1], greedy(2)).cancel())
    admitting.start()
    admitting.join(5)
    held_up = admitting.is_alive()
    release.set()
    admitting.join(20)
    assert not held_up
    wait_until(lambda: empty(engine))


def test_a_watchdog_sees_how_long_the_step_has_been_running(engine: Engine) -> None:
    release = threading.Event()

    def hang(plan: Plan, logits: Tensor) -> Tensor:
        release.wait(20)
        return logits

    assert engine.step_seconds is None
    engine.runner = Sabotaged(engine.runner, hang)
    generation = run(engine, "The", LONG)
    wait_until(lambda: (engine.step_seconds or 0) > 0.05)
    generation.cancel()
    assert generation.result(1).finish_reason is FinishReason.CANCELLED
    release.set()
    wait_until(lambda: engine.step_seconds is None and empty(engine))


def test_a_thousand_mixed_requests_with_cancels_leave_nothing_behind(engine: Engine) -> None:
    rng = random.Random(0)
    threads = threading.active_count()
    prompts = [engine.loaded.encode(p) for p in mixed_prompts(20, longest=80)]

    def client(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(125):
            params = SamplingParams(rng.randint(1, 6), seed=rng.randrange(99))
            with engine.admit(rng.choice(prompts), params) as generation:
                if rng.random() < 0.9:
                    generation.start()
                if rng.random() < 0.5:
                    time.sleep(rng.random() / 500)
                    generation.cancel()
                elif generation.sequence.status != "admitted":
                    generation.result(30)

    clients = [threading.Thread(target=client, args=(rng.randrange(999),)) for _ in range(8)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(60)
    wait_until(lambda: empty(engine) and not engine._to_free)
    assert engine._generations == {}
    assert engine.scheduler.promised_tokens == 0
    runner: Any = engine.runner
    assert runner.prefixes.chunks
    assert not any(arena.sequences for arena in runner.cache.arenas)
    assert threading.active_count() == threads
    assert run(engine, "The", greedy(3)).result(5).token_ids
