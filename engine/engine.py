"""Runs generations on one model. Knows token ids and sampling; knows no HTTP, no SQL, no settings.

Requests run side by side in a thread pool, each on its own key-value cache and its own random
generator, so that what runs beside it changes nothing.
"""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from types import TracebackType
from typing import Self

import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.errors import EngineFullError, EngineStoppedError, GenerationError
from engine.loading import LoadedModel
from engine.sampling import Completion, FinishReason, SamplingParams

WORKERS = 2


class Engine:
    """``max_waiting`` generations may wait or run at a time."""

    def __init__(self, loaded: LoadedModel, *, max_waiting: int) -> None:
        self.loaded = loaded
        self.places = threading.BoundedSemaphore(max_waiting)
        self.pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="inference")
        self.closed = False

    @property
    def healthy(self) -> bool:
        return not self.closed

    def admit(self, prompt_ids: Sequence[int], params: SamplingParams) -> "Generation":
        """A place in the queue, taken until the generation is left. It runs once it is started.

        Raises EngineFullError, EngineStoppedError.
        """
        if self.closed:
            raise EngineStoppedError
        if not self.places.acquire(blocking=False):
            raise EngineFullError
        return Generation(self, list(prompt_ids), params)

    def close(self, timeout: float) -> None:
        """Run nothing more; ``timeout`` bounds the wait for what runs."""
        self.closed = True
        self.pool.shutdown(wait=timeout > 0, cancel_futures=True)


class Generation:
    """A handle: start it, wait for it, cancel it. Leaving it gives its place back."""

    def __init__(self, engine: Engine, prompt_ids: list[int], params: SamplingParams) -> None:
        self.engine = engine
        self.prompt_ids = prompt_ids
        self.params = params
        self.future: Future[Completion] | None = None
        self.cancelled: FinishReason | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()
        self.engine.places.release()

    def start(self) -> None:
        try:
            self.future = self.engine.pool.submit(self.run)
        except RuntimeError:
            raise EngineStoppedError from None

    def cancel(self, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """Stop within one step."""
        self.cancelled = self.cancelled or reason

    def result(self, timeout: float | None = None) -> Completion:
        """Wait, at most ``timeout`` seconds. Raises TimeoutError, GenerationError."""
        assert self.future is not None
        try:
            return self.future.result(timeout)
        except FutureTimeoutError:
            raise TimeoutError from None
        except Exception as error:
            raise GenerationError(type(error).__name__) from error

    @torch.inference_mode()
    def run(self) -> Completion:
        ids: list[int] = []
        for token in self.tokens():
            if token in self.engine.loaded.end_ids:
                return self.completion(ids, FinishReason.STOP)
            ids.append(token)
            if self.params.stop and self.stop_at(self.text(ids)) is not None:
                return self.completion(ids, FinishReason.STOP)
            if self.cancelled is not None:
                return self.completion(ids, self.cancelled)
        return self.completion(ids, FinishReason.LENGTH)

    def tokens(self) -> Iterator[int]:
        """Token after token, each from one forward pass over what is new."""
        model, cache = self.engine.loaded.model, None
        rng = torch.Generator(model.device).manual_seed(self.params.seed)
        processors = logits_processors(self.params)
        every = torch.tensor([self.prompt_ids], device=model.device)
        new = every
        for _ in range(self.params.max_new_tokens):
            step = model(new, past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            scores = processors(every, step.logits[:, -1].float())
            if self.params.temperature == 0:
                new = scores.argmax(dim=-1, keepdim=True)
            else:
                new = torch.multinomial(scores.softmax(dim=-1), 1, generator=rng)
            every = torch.cat([every, new], dim=1)
            yield int(new)

    def completion(self, ids: list[int], reason: FinishReason) -> Completion:
        text = self.text(ids)
        return Completion(tuple(ids), text[: self.stop_at(text)], reason)

    def text(self, ids: list[int]) -> str:
        decode = self.engine.loaded.decode
        return decode(self.prompt_ids + ids)[len(decode(self.prompt_ids)) :]

    def stop_at(self, text: str) -> int | None:
        """Where the first stop string begins."""
        found = [at for stop in self.params.stop if (at := text.find(stop)) >= 0]
        return min(found, default=None)


def logits_processors(params: SamplingParams) -> LogitsProcessorList:
    """Transformers' own, in its order."""
    chosen = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        chosen.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature != 0:
        chosen.append(TemperatureLogitsWarper(params.temperature))
        if params.top_k:
            chosen.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1.0:
            chosen.append(TopPLogitsWarper(params.top_p))
    return chosen
