"""The model this process serves: loading, ready, or failed with a reason.

The model is loaded in a thread of its own, so that the port is open and the history readable
meanwhile.
"""

import gc
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.naming import called
from engine.sampling import FinishReason
from errors import ModelNotReadyError
from log import event

if TYPE_CHECKING:  # importing torch takes seconds; the loading thread does it
    from engine.engine import Engine, StepOutput
    from engine.loading import LoadedModel

log = logging.getLogger(__name__)

WATCH_SECONDS = 1.0
MAX_RUNNING = 64  # sequences that share a step


class ModelHost:
    """Loads one model and runs it.

    ``on_failure`` is called when a model that somebody named did not load, or when the engine died;
    ``on_step`` once a step with what it gave all running generations.
    """

    def __init__(
        self,
        name: str | None,
        dtype: str,
        device: str,
        max_waiting: int,
        on_failure: Callable[[], None],
        on_step: "Callable[[list[StepOutput]], None]",
    ) -> None:
        self.name, self.dtype, self.device = name, dtype, device
        self.max_waiting = max_waiting
        self.on_failure = on_failure
        self.on_step = on_step
        self.engine: Engine | None = None
        self.model: LoadedModel | None = None
        self.failure: str | None = None
        self.gave_up = False  # the process has to end, because of the model
        self.closed = False
        self.refusal: str | None = None
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self.load, name="load-model", daemon=True)

    @property
    def capacity(self) -> int:
        """The most generations that can be waiting or running."""
        return self.max_waiting + MAX_RUNNING

    def start(self) -> None:
        self.thread.start()

    def load(self) -> None:
        began = time.monotonic()
        from engine.engine import Engine, EngineStoppedError
        from engine.loading import ModelUnavailableError, load_model

        try:
            model = load_model(self.name, self.dtype, self.device)
            engine = Engine(model, max_waiting=self.max_waiting, max_running=MAX_RUNNING)
        except ModelUnavailableError as error:
            self.fail(str(error))
            return
        except EngineStoppedError as error:
            self.fail(f"the model was loaded but does not run: {error}")
            return
        except Exception as error:
            log.exception("the model did not load")
            self.fail(f"the model did not load ({type(error).__name__})")
            return
        engine.subscribe(self.on_step)
        # A collection that looks at all that torch and transformers made stops every thread for a
        # third of a second, and such come every few thousand tokens. None of it is ever garbage.
        gc.collect()
        gc.freeze()
        with self.lock:
            if self.closed:
                engine.close(timeout=5.0)
                return
            self.model, self.engine = model, engine
        event(
            log,
            logging.INFO,
            "model ready",
            model=model.name,
            dtype=model.dtype,
            device=model.device,
            context=model.context_size,
            seconds=round(time.monotonic() - began, 2),
        )

    def fail(self, reason: str) -> None:
        self.failure = reason
        event(log, logging.ERROR, reason)
        if self.name is not None:
            self.give_up()

    def give_up(self) -> None:
        self.gave_up = True
        self.on_failure()

    def running(self) -> tuple["LoadedModel", "Engine"]:
        """Raises ModelNotReadyError, with the reason."""
        if (reason := self.unready()) is not None:
            raise ModelNotReadyError(f"The model is not ready: {reason}.")
        assert self.model is not None
        assert self.engine is not None
        return self.model, self.engine

    def model_name(self) -> str:
        """What runs, or will: for rows that name it before it is loaded."""
        return self.model.name if self.model is not None else called(self.name)

    def unready(self) -> str | None:
        """Why the model cannot be used now, in words that a client may see; None when it can."""
        if self.refusal is not None:
            return self.refusal
        if self.engine is not None:
            return None if self.engine.healthy else "it stopped after an error"
        return "it is still loading" if self.failure is None else "it did not load"

    def refuse(self, reason: str) -> None:
        """Take no more work; what runs goes on."""
        self.refusal = reason

    def check(self) -> None:
        """End the process when its engine has died: nobody waits for it, and a new one may live."""
        engine = self.engine
        if engine is None or engine.healthy or self.refusal is not None or self.closed:
            return
        self.refuse("it stopped after an error")
        event(log, logging.ERROR, "the engine died", reason=engine.failure)
        self.give_up()

    def hangs(self, limit: float) -> bool:
        """Whether the step that runs now has been running for more than ``limit`` seconds."""
        seconds = self.engine.step_seconds if self.engine is not None else None
        return seconds is not None and seconds > limit

    def close(self) -> None:
        """Interrupt what runs."""
        with self.lock:
            self.closed = True
        if self.engine is not None:
            self.engine.close(timeout=5.0, reason=FinishReason.INTERRUPTED)
