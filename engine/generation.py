"""A caller's handle on one generation: start, watch, cancel, await. Knows no model, no scheduling.

Text is made from tokens by whoever asks for it, in the asker's thread: the worker that runs the
model decodes only where a stop string makes it look.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from engine.detokenizer import Detokenizer
from engine.sampling import Completion, FinishReason
from engine.sequence import Sequence, Status


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a generation has so far; ``finish_reason`` is None while it goes on.

    ``text`` ends neither in half a character nor in what may become a stop string, so it may be
    the text of fewer tokens than ``token_ids``.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None


class Generation:
    """Made by ``Engine.admit``. Leaving it as a context manager cancels what has not ended.

    Every method may be called from any thread.
    """

    def __init__(
        self,
        sequence: Sequence,
        detokenizer: Detokenizer,
        start: Callable[["Generation"], None],
        cancel: Callable[["Generation", FinishReason], None],
    ) -> None:
        self.sequence = sequence
        self.error: Exception | None = None
        self._detokenizer = detokenizer
        self._text_lock = threading.Lock()
        self._changed = threading.Condition()
        self._watchers = 0
        self._start = start
        self._cancel = cancel

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()

    def start(self) -> None:
        """Let it run. Raises EngineStoppedError; a second call does nothing."""
        self._start(self)

    def cancel(self, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """End it here, with what it has; nothing if it has ended. It gets no further token."""
        self._cancel(self, reason)

    @property
    def ended(self) -> bool:
        return self.sequence.ended

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for its end, ``timeout`` seconds at most.

        A cancelled one has the text it came to and the reason it was given. Raises TimeoutError,
        GenerationError, EngineStoppedError; RuntimeError if it was never started.
        """
        if self.sequence.status is Status.ADMITTED:
            raise RuntimeError("start the generation before waiting for its result")
        with self._changed:
            if not self._changed.wait_for(lambda: self.ended, timeout):
                raise TimeoutError("the generation has not ended")
        self._raise_error()
        snapshot = self.snapshot()
        assert snapshot.finish_reason is not None
        return Completion(snapshot.token_ids, snapshot.text, snapshot.finish_reason)

    def snapshot(self) -> Snapshot:
        """Its tokens and text at this moment."""
        reason = self.sequence.finish_reason if self.ended else None
        ids, text = self._read(final=reason is not None)
        return Snapshot(ids, text, reason)

    def pieces(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """The new (token ids, text) after each step, until it ends; joined, they are the result's.

        Raises as ``result`` does, after the last piece.
        """
        ids, text = 0, 0
        with self._changed:
            self._watchers += 1
        try:
            while True:
                self._wait_for_more_than(ids)
                ended = self.ended
                snapshot = self.snapshot()
                if len(snapshot.token_ids) > ids or len(snapshot.text) > text:
                    yield snapshot.token_ids[ids:], snapshot.text[text:]
                ids, text = len(snapshot.token_ids), len(snapshot.text)
                if ended:
                    break
        finally:
            with self._changed:
                self._watchers -= 1
        self._raise_error()

    # The engine's side.

    def reached_stop(self) -> bool:
        """Whether the newest token completed a stop string."""
        if not self.sequence.params.stop:
            return False
        self._read(final=False)
        return self._detokenizer.stopped

    def notify(self) -> None:
        """Wake whoever waits, if there is something new for it."""
        if self._watchers or self.ended:
            with self._changed:
                self._changed.notify_all()

    def _wait_for_more_than(self, tokens: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.ended or len(self.sequence.output_ids) > tokens)

    def _read(self, *, final: bool) -> tuple[tuple[int, ...], str]:
        with self._text_lock:
            ids = tuple(self.sequence.output_ids)
            self._detokenizer.push(ids[self._detokenizer.pushed :])
            if final:
                self._detokenizer.finish()
            return ids, self._detokenizer.shown

    def _raise_error(self) -> None:
        if self.error is not None:
            # A new one each time: raising one object in two threads mixes up their tracebacks.
            raise type(self.error)(*self.error.args)
