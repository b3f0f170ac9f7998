"""The engine: takes requests, drives the batched model with one worker thread, tells who waits.

Callers' threads admit, start, cancel and wait; one worker thread plans a step, runs it and hands
its tokens over, all sequences at once. One lock guards the queues and is never held while the
model runs. Only the worker touches the runner. Knows no HTTP, no SQL, no settings.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch

from engine.detokenizer import Detokenizer
from engine.errors import EngineFullError, EngineStoppedError, GenerationError
from engine.generation import Generation
from engine.loading import LoadedModel
from engine.ragged import Limits
from engine.runner import Runner, runner_for
from engine.sampler import sample
from engine.sampling import FinishReason, SamplingParams
from engine.scheduler import Plan, Scheduler
from engine.sequence import Sequence as Running
from engine.sequence import Status

__all__ = [
    "Engine",
    "EngineFullError",
    "EngineStoppedError",
    "Generation",
    "GenerationError",
    "StepOutput",
]

log = logging.getLogger(__name__)

MAX_WAITING = 256
MAX_RUNNING = 64
KV_TOKENS = 32 * 1024
PREFILL_TOKENS = 256
PREFIX_BYTES = 512 * 1024 * 1024
NICE = 5  # of the worker; 0 is as everybody, 19 the least


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step gave one generation; ``finish_reason`` is None while it goes on."""

    generation: Generation
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None


Subscriber = Callable[[list[StepOutput]], None]


@dataclass(slots=True)
class Outcome:
    """What a step computed: a token a sequence (None: not finite), or why there is none."""

    tokens: dict[Running, int | None]
    errors: dict[Running, Exception]


class Engine:
    """``max_running`` sequences share a step, ``max_waiting`` more wait their turn, and those that
    run may together grow to ``kv_tokens`` tokens (or one to the model's whole context). Keys and
    values of earlier prompts take ``prefix_bytes`` bytes at most. Raises EngineStoppedError, with
    the reason, where the model cannot be run."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        max_waiting: int = MAX_WAITING,
        max_running: int = MAX_RUNNING,
        kv_tokens: int = KV_TOKENS,
        prefill_tokens: int = PREFILL_TOKENS,
        prefix_bytes: int = PREFIX_BYTES,
    ) -> None:
        self.loaded = loaded
        self._built = threading.Event()
        limits = Limits(loaded.context_size, max_running, prefill_tokens, prefix_bytes)
        self._build = partial(runner_for, loaded, limits)
        self.scheduler = Scheduler(
            max_waiting=max_waiting,
            max_running=max_running,
            kv_tokens=max(kv_tokens, loaded.context_size),
            prefill_tokens=prefill_tokens,
        )
        self._lock = threading.Condition()
        self._generations: dict[Running, Generation] = {}
        self._to_free: list[Running] = []
        self._subscribers: list[Subscriber] = []
        self._closing = False
        self._failure: str | None = None
        self._step_began: float | None = None
        self._worker = threading.Thread(target=self._work, name="inference", daemon=True)
        self._worker.start()
        self._built.wait()
        if self._failure is not None:
            raise EngineStoppedError(self._failure)

    # What callers use.

    def admit(self, prompt_ids: Sequence[int], params: SamplingParams) -> Generation:
        """A place in the queue, held until the generation ends. It runs once it is started.

        Raises EngineFullError, EngineStoppedError; ValueError for what the model cannot run.
        """
        self._check(prompt_ids, params)
        sequence = Running(tuple(prompt_ids), params)
        detokenizer = Detokenizer(self.loaded.decode, sequence.prompt_ids, params.stop)
        generation = Generation(sequence, detokenizer, self._start, self._cancel)
        with self._lock:
            self._raise_if_stopped()
            self.scheduler.admit(sequence)
            self._generations[sequence] = generation
        return generation

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Call it once a step with every running generation's new tokens, and at a generation's
        end; returns what ends the subscription.

        It is called in the thread that made the step or the end, and has to be quick.
        """
        with self._lock:
            self._subscribers = [*self._subscribers, subscriber]
        return lambda: self._unsubscribe(subscriber)

    def close(self, timeout: float, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """End everything for ``reason`` and wait for the worker, ``timeout`` seconds at most."""
        with self._lock:
            self._closing = True
            ended = [self._end(g, Status.CANCELLED, reason) for g in [*self._generations.values()]]
            self._lock.notify_all()
        self._publish(ended)
        if self._worker is not threading.current_thread():
            self._worker.join(timeout)

    @property
    def healthy(self) -> bool:
        return not self._closing and self._failure is None and self._worker.is_alive()

    @property
    def failure(self) -> str | None:
        """Why it runs nothing any more, safe to show an operator; None while it is healthy."""
        if self._failure is not None:
            return self._failure
        if self._closing:
            return "the engine was closed"
        return None if self._worker.is_alive() else "the inference worker is gone"

    @property
    def running(self) -> int:
        return len(self.scheduler.running)

    @property
    def waiting(self) -> int:
        """Places taken in the queue, by generations that were started and that were not yet."""
        return len(self.scheduler.waiting) + len(self.scheduler.admitted)

    @property
    def used_slots(self) -> int:
        """Sequences whose keys and values are kept."""
        return self.runner.used

    @property
    def reused_tokens(self) -> int:
        """Prompt tokens that were not computed because an earlier prompt began with them."""
        return self.runner.reused_tokens

    @property
    def reproducible(self) -> bool:
        """Whether the text of a request is independent of what runs beside it, bit for bit."""
        return self.runner.reproducible

    @property
    def step_seconds(self) -> float | None:
        """For a watchdog: how long the step that runs now has been running, if one is."""
        began = self._step_began
        return None if began is None else time.monotonic() - began

    # Behind a generation's handle.

    def _start(self, generation: Generation) -> None:
        with self._lock:
            if generation.sequence.status is not Status.ADMITTED:
                if generation.error is not None:
                    raise type(generation.error)(*generation.error.args)
                return
            self._raise_if_stopped()
            self.scheduler.start(generation.sequence)
            self._lock.notify_all()

    def _cancel(self, generation: Generation, reason: FinishReason) -> None:
        with self._lock:
            if generation.ended:
                return
            ended = self._end(generation, Status.CANCELLED, reason)
            self._lock.notify_all()  # an idle worker frees what it held
        self._publish([ended])

    def _unsubscribe(self, subscriber: Subscriber) -> None:
        with self._lock:
            self._subscribers = [s for s in self._subscribers if s is not subscriber]

    def _check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        vocabulary = self.loaded.model.config.get_text_config().vocab_size
        if not prompt_ids or params.max_new_tokens < 1:
            raise ValueError("a generation takes a prompt token and room for a new one")
        if len(prompt_ids) + params.max_new_tokens > self.loaded.context_size:
            raise ValueError(
                f"{len(prompt_ids)} prompt tokens and {params.max_new_tokens} new ones pass the"
                f" model's context of {self.loaded.context_size}"
            )
        if not all(0 <= token < vocabulary for token in prompt_ids):
            raise ValueError("a prompt token is not in the model's vocabulary")
        if params.temperature < 0 or params.repetition_penalty <= 0 or params.top_k < 0:
            raise ValueError("temperature, top_k or repetition_penalty is out of range")

    def _raise_if_stopped(self) -> None:
        if not self.healthy:
            raise EngineStoppedError(self.failure)

    # The worker.

    @torch.inference_mode()
    def _work(self) -> None:
        try:
            step_back()
            # Here, not in the constructor: OpenMP keeps a pool for each thread that computes, and
            # with more pool threads than cores each product waits for a sleeping one to wake.
            self.runner: Runner = self._build()
            self._built.set()
            while (plan := self._next_plan()) is not None:
                self._step(plan)
        except BaseException as error:
            log.exception("the inference worker died")
            self._die(self._reason(error))
        finally:
            self._built.set()

    def _reason(self, error: BaseException) -> str:
        kind = type(error).__name__
        if self._built.is_set():
            return f"the inference worker died ({kind})"
        # Nobody has asked for anything yet, so there is no text that the message could tell.
        said = str(error).partition("\n")[0]
        return f"the engine could not be built ({kind}: {said})"

    def _next_plan(self) -> Plan | None:
        """Wait for work; None when the engine is closed."""
        while True:
            self._free_ended()
            with self._lock:
                if self._to_free:
                    continue
                if self._closing:
                    return None
                if self.scheduler.has_work:
                    return self.scheduler.schedule(self.runner.reuse)
                self._lock.wait()

    def _step(self, plan: Plan) -> None:
        self._step_began = time.monotonic()
        try:
            outcome = self._compute(plan)
        finally:
            self._step_began = None
        with self._lock:
            outputs = self._apply(plan, outcome)
        self._publish(outputs)

    def _compute(self, plan: Plan) -> Outcome:
        """Run the step. If it raises, run each sequence alone: only who raises again has failed."""
        try:
            return Outcome(self._tokens(plan), {})
        except torch.AcceleratorError:  # of the device, which computes nothing any more after one
            raise
        except Exception as error:
            log.warning("a step raised %s: running its sequences one by one", type(error).__name__)
        outcome = Outcome({}, {})
        for alone in plan.apart():
            try:
                outcome.tokens.update(self._tokens(alone))
            except torch.AcceleratorError:
                raise
            except Exception as error:
                log.debug("a sequence raised alone", exc_info=True)
                outcome.errors[alone.sequences[0]] = error
        return outcome

    def _tokens(self, plan: Plan) -> dict[Running, int | None]:
        chosen = sample(self.runner.forward(plan), plan.sampled)
        return dict(zip(plan.sampled, chosen, strict=True))

    def _apply(self, plan: Plan, outcome: Outcome) -> list[StepOutput]:
        failed = [self._fail(s, type(e).__name__) for s, e in outcome.errors.items()]
        outputs = [output for output in failed if output is not None]
        for chunk in plan.prefill:
            chunk.sequence.computed = chunk.stop
        for sequence, token in outcome.tokens.items():
            if token is None:
                self.runner.free(sequence, tainted=True)
            if not sequence.ended:
                outputs.append(self._extend_or_fail(self._generations[sequence], token))
        return outputs

    def _extend_or_fail(self, generation: Generation, token: int | None) -> StepOutput:
        """Looking for a stop string decodes, and a tokenizer may know no text for a token."""
        ids = generation.sequence.output_ids
        before = len(ids)
        try:
            return self._extend(generation, token)
        except Exception as error:
            log.debug("a token could not be added", exc_info=True)
            del ids[before:]
            return self._failed(generation, type(error).__name__)

    def _extend(self, generation: Generation, token: int | None) -> StepOutput:
        sequence = generation.sequence
        if token is None:
            generation.error = GenerationError("the model's output is not a finite number")
            return self._end(generation, Status.FAILED, FinishReason.ERROR)
        sequence.computed = len(sequence)
        if token in self.loaded.end_ids:
            return self._end(generation, Status.FINISHED, FinishReason.STOP)
        sequence.output_ids.append(token)
        if generation.reached_stop():
            return self._end(generation, Status.FINISHED, FinishReason.STOP, token)
        if len(sequence.output_ids) == sequence.params.max_new_tokens:
            return self._end(generation, Status.FINISHED, FinishReason.LENGTH, token)
        return StepOutput(generation, (token,), None)

    def _fail(self, sequence: Running, why: str) -> StepOutput | None:
        return None if sequence.ended else self._failed(self._generations[sequence], why)

    def _failed(self, generation: Generation, why: str) -> StepOutput:
        generation.error = GenerationError(f"the model failed on this generation ({why})")
        return self._end(generation, Status.FAILED, FinishReason.ERROR)

    def _end(
        self, generation: Generation, status: Status, reason: FinishReason, *tokens: int
    ) -> StepOutput:
        """Take it out of everything; the lock is held. Its slot is freed by the worker."""
        sequence = generation.sequence
        self.scheduler.end(sequence, status, reason)
        del self._generations[sequence]
        self._to_free.append(sequence)
        return StepOutput(generation, tokens, reason)

    def _free_ended(self) -> None:
        """Without the lock: keeping a prompt for later ones may wait for the device."""
        with self._lock:
            ended, self._to_free = self._to_free, []
        for sequence in ended:
            self.runner.free(sequence)

    def _publish(self, outputs: list[StepOutput]) -> None:
        for output in outputs:
            output.generation.notify()
        for subscriber in self._subscribers if outputs else ():
            try:
                subscriber(outputs)
            except Exception:
                log.exception("a subscriber to the engine's steps raised")

    def _die(self, failure: str) -> None:
        """Tell everybody at once."""
        with self._lock:
            self._failure = failure
            outputs = []
            for generation in [*self._generations.values()]:
                generation.error = EngineStoppedError(failure)
                outputs.append(self._end(generation, Status.FAILED, FinishReason.ERROR))
        self._publish(outputs)


def step_back() -> None:
    """Let this thread, and those that it will make, give way to the others of the process.

    Who computes is always ready to run; who answers a request has little to do and is waited for.
    Linux alone has priorities of threads. What an operator gave the process less of stays so.
    """
    if sys.platform == "linux":
        me = threading.get_native_id()
        with suppress(OSError):  # a sandbox may forbid it
            os.setpriority(os.PRIO_PROCESS, me, max(NICE, os.getpriority(os.PRIO_PROCESS, me)))
