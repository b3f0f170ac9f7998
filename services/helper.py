"""A second process for work that needs nothing from the first: Python's lock is not in its way."""

import contextlib
import gc
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, Self

Answering = Callable[[Any], Any]


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Rows hold no cycles: while many are made, the collector would only look at them all again."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Whoever is started in the block never hears of Ctrl-C: it is for the process that waits."""
    resource_tracker.ensure_running()  # to start it later would let the signal in again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Helper:
    """Answers one question at a time by what ``make(*given)`` makes there.

    While it starts, and when it is dead, it has no answers: who asks has to do without. It ends
    when its pipe does, however this process ends.
    """

    def __init__(self, make: Callable[..., Answering], *given: Any) -> None:
        spawning = multiprocessing.get_context("spawn")  # a fork would share our connections
        self.pipe, theirs = spawning.Pipe()
        self.process = spawning.Process(target=serve, args=(theirs, make, given), daemon=True)
        with uninterrupted():
            self.process.start()
        theirs.close()
        self.is_ready = False
        self.is_asked = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.pipe.close()
        self.process.join()

    def ask(self, question: Any) -> None:
        try:
            if not self.is_ready and self.pipe.poll():
                self.is_ready = self.pipe.recv()
            if self.is_ready:
                self.pipe.send(question)
                self.is_asked = True
        except (EOFError, OSError):
            self.is_ready = False

    def answer(self) -> Any:
        """To what it was asked last; None if it was not, or died."""
        if not self.is_asked:
            return None
        self.is_asked = False
        try:
            with uncollected():
                return self.pipe.recv()
        except (EOFError, OSError):
            self.is_ready = False
            return None


def serve(pipe: Connection, make: Callable[..., Answering], given: tuple[Any, ...]) -> None:
    # The other end is gone, or something is wrong, which who asked finds out by doing without.
    with contextlib.suppress(Exception):
        answering = make(*given)
        gc.freeze()
        pipe.send(True)
        while True:
            pipe.send(answering(pipe.recv()))
