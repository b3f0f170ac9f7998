"""Who runs in the next step. Plain data: no torch, no clock, no lock (its owner holds one).

First come, first served: the oldest waiting sequence takes the next free slot, and none overtakes
it while it waits for room. Every running sequence decodes in every step; prompts are computed in
chunks beside them, so that a long one delays the others by one chunk a step, not by its length.

Chunks lie on a fixed grid (``CHUNK`` tokens), whatever else runs: how a prompt is cut is one of
the things that change its last bits (docs/decisions/0002-reproducible-batches.md).
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from engine.errors import EngineFullError
from engine.sampling import FinishReason
from engine.sequence import Sequence, Status

CHUNK = 64


@dataclass(frozen=True, slots=True)
class Chunk:
    """Prompt tokens ``start`` to ``stop`` of a sequence, to be computed in one step."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def ends_prompt(self) -> bool:
        return self.stop == len(self.sequence.prompt_ids)


@dataclass(frozen=True, slots=True)
class Plan:
    """The work of one step. Each decoding sequence computes its last token."""

    decode: tuple[Sequence, ...]
    prefill: tuple[Chunk, ...]

    @property
    def sampled(self) -> tuple[Sequence, ...]:
        """The sequences that get a token from this step, in the order of the runner's logits."""
        return self.decode + tuple(c.sequence for c in self.prefill if c.ends_prompt)

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        return self.decode + tuple(chunk.sequence for chunk in self.prefill)

    def apart(self) -> list["Plan"]:
        """The same work, a plan for each sequence."""
        return [Plan((s,), ()) for s in self.decode] + [Plan((), (c,)) for c in self.prefill]


class Scheduler:
    """``kv_tokens`` bounds the tokens that all running sequences together may grow to."""

    def __init__(
        self, *, max_waiting: int, max_running: int, kv_tokens: int, prefill_tokens: int
    ) -> None:
        if min(max_waiting, max_running, kv_tokens) < 1 or prefill_tokens < CHUNK:
            raise ValueError("the scheduler needs room for one sequence and one chunk at least")
        self.max_waiting = max_waiting
        self.max_running = max_running
        self.kv_tokens = kv_tokens
        self.prefill_tokens = prefill_tokens
        self.admitted: set[Sequence] = set()
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.promised_tokens = 0

    def admit(self, sequence: Sequence) -> None:
        """Give it a place in the queue. Raises EngineFullError; ValueError if it can never run."""
        if sequence.longest > self.kv_tokens:
            raise ValueError(f"{sequence.longest} tokens do not fit into {self.kv_tokens}")
        # Not by who waits: all who came since the last step do, though slots are free for them.
        taken = len(self.admitted) + len(self.waiting) + len(self.running)
        if taken >= self.max_waiting + self.max_running:
            raise EngineFullError(f"{taken} generations are running or waiting already")
        self.admitted.add(sequence)

    def start(self, sequence: Sequence) -> None:
        self.admitted.remove(sequence)
        sequence.status = Status.WAITING
        self.waiting.append(sequence)

    def schedule(self, reuse: Callable[[Sequence], int] = lambda _: 0) -> Plan:
        """Fill free slots, then plan one step for everything that runs.

        ``reuse`` tells how many of a new sequence's first tokens are computed already, in whole
        chunks.
        """
        while self.waiting and self._fits(self.waiting[0]):
            sequence = self.waiting.popleft()
            sequence.status = Status.RUNNING
            sequence.computed = reuse(sequence)
            self.running.append(sequence)
            self.promised_tokens += sequence.longest
        decode = tuple(s for s in self.running if s.decoding)
        return Plan(decode, tuple(self._chunks()))

    def end(self, sequence: Sequence, status: Status, reason: FinishReason) -> None:
        """Take it out, wherever it is. Ending twice keeps the first end."""
        if sequence.ended:
            return
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            self.promised_tokens -= sequence.longest
        elif sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        else:
            self.admitted.discard(sequence)
        sequence.finish_reason = reason
        sequence.status = status  # last: who reads this without the lock may then read the reason

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def _fits(self, sequence: Sequence) -> bool:
        return (
            len(self.running) < self.max_running
            and self.promised_tokens + sequence.longest <= self.kv_tokens
        )

    def _chunks(self) -> list[Chunk]:
        room = self.prefill_tokens
        chunks = []
        for sequence in self.running:
            if sequence.decoding:
                continue
            start = sequence.computed
            stop = min(start - start % CHUNK + CHUNK, len(sequence.prompt_ids))
            if stop - start > room:
                break
            chunks.append(Chunk(sequence, start, stop))
            room -= stop - start
        return chunks
