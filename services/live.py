"""Generations that run in this process, and whoever follows them.

A producer owns a generation and stores its end; followers only read. Each reads the text so far
from its own place on, so nothing is buffered for anybody: a slow follower gets larger pieces.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from typing import TYPE_CHECKING

from engine.sampling import FinishReason
from errors import ServiceError
from models import GenerationRecord

if TYPE_CHECKING:
    from engine.engine import Generation, StepOutput


class Live:
    """One running generation. ``outcome`` is None until its end is stored.

    At ``deadline``, of the monotonic clock, it is cancelled.
    When its last follower leaves before the end it is cancelled, unless ``finish_alone``.
    """

    def __init__(
        self,
        record: GenerationRecord,
        generation: "Generation",
        finish_alone: bool,
        deadline: float,
    ) -> None:
        self.record = record
        self.generation = generation
        self.finish_alone = finish_alone
        self.deadline = deadline
        self.began = time.monotonic()
        self.outcome: GenerationRecord | ServiceError | None = None
        self.checkpointed = 0  # characters stored so far
        self.checkpointed_at = self.began
        self.seen = False  # by a follower, ever
        self.followers = 0
        self.version = 0
        self.changed = asyncio.Event()

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def seconds_left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def wake(self) -> None:
        """Let followers look again; on the event loop."""
        self.version += 1
        self.changed.set()
        self.changed.clear()

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Somebody follows; on the event loop. That the last one leaves is noticed."""
        self.followers += 1
        try:
            yield
        finally:
            self.leave()

    async def follow(self, offset: int) -> AsyncGenerator[str]:
        """Pieces of the text from character ``offset`` on, until the end is stored.

        While it is ``followed``: only then is it told of what comes.
        """
        self.seen = True
        while True:
            seen, ended = self.version, self.outcome is not None
            text = self.generation.snapshot().text
            if len(text) > offset:
                yield text[offset:]
                offset = len(text)
            if ended:
                return
            while self.version == seen:
                await self.changed.wait()

    def leave(self) -> None:
        self.followers -= 1
        if self.followers == 0 and self.outcome is None and not self.finish_alone:
            self.generation.cancel(FinishReason.DISCONNECTED)


class LiveGenerations:
    """All of them, by record. Wakes followers once a step for all generations together."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.lock = threading.Condition()
        self.by_record: dict[int, Live] = {}
        self.by_generation: dict[Generation, Live] = {}
        self.all_finish = False

    def let_finish(self) -> None:
        """From now on nobody's leaving cancels a generation: they leave because they are told to.

        In a signal handler.
        """
        self.all_finish = True
        for live in self.all():
            live.finish_alone = True

    def add(self, live: Live) -> None:
        with self.lock:
            live.finish_alone |= self.all_finish
            self.by_record[live.record.id] = live
            self.by_generation[live.generation] = live

    def end(self, live: Live, outcome: GenerationRecord | ServiceError) -> None:
        """Its end is stored, or cannot be: tell the followers and forget it."""
        with self.lock:
            live.outcome = outcome
            if self.by_record.get(live.record.id) is live:  # a retry may run in the row by now
                del self.by_record[live.record.id]
            del self.by_generation[live.generation]
            self.lock.notify_all()
        self.wake([live])

    def get(self, owner_id: str, record_id: int) -> Live | None:
        with self.lock:
            live = self.by_record.get(record_id)
        return live if live is not None and live.record.owner_id == owner_id else None

    def wait_for_end(self, owner_id: str, record_id: int, timeout: float) -> bool:
        """Wait until a generation of this process has ended; False if it runs elsewhere."""
        live = self.get(owner_id, record_id)
        if live is None:
            return False
        with self.lock:
            self.lock.wait_for(lambda: live.outcome is not None, timeout)
        return True

    def all(self) -> list[Live]:
        with self.lock:
            return list(self.by_record.values())

    def wait_until_none(self, timeout: float) -> bool:
        with self.lock:
            return self.lock.wait_for(lambda: not self.by_record, timeout)

    def on_step(self, outputs: "list[StepOutput]") -> None:
        """The engine's subscriber, in its thread: cross to the event loop once."""
        with self.lock:
            found = [self.by_generation.get(output.generation) for output in outputs]
        followed = [live for live in found if live is not None and live.followers]
        if followed:
            self.wake(followed)

    def wake(self, lives: list[Live]) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(wake_all, lives)


def wake_all(lives: list[Live]) -> None:
    for live in lives:
        live.wake()
