"""One generation: plan it, accept it, let the engine run it, finish it.

The prompt is committed before the model runs and the text before the client hears of it. No
connection is held in between.
"""

import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from threading import Semaphore
from typing import TYPE_CHECKING

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from database import Database
from engine.errors import EngineFullError, EngineStoppedError, GenerationError
from errors import (
    DeadlineExceededError,
    GenerationFailedError,
    InterruptedGenerationError,
    InvalidRequestError,
    ModelNotReadyError,
    OverloadedError,
    ServiceError,
    StorageUnavailableError,
)
from models import AnalyzeRequest, GenerateRequest, GenerationRecord, SamplingOptions
from services.accepting import Accepter, TakenError, nothing
from services.cache import ResponseCache
from services.content_filter import ContentFilter
from services.crowds import Crowds
from services.endings import Ending, ending_of, outcome
from services.finishing import Finisher
from services.idempotency import Key, first_try, once_of, was_cut_short
from services.leases import LeaseKeeper
from services.live import Live, LiveGenerations
from services.model_host import ModelHost
from services.patience import Patience
from services.planning import Ask, Plan, plan_prompt
from services.turns import Turns

if TYPE_CHECKING:
    from engine.engine import Engine, Generation
    from engine.loading import LoadedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """What is stored already: the text of another record, or what a key was answered before."""

    record: GenerationRecord
    replayed: bool = False


class GenerationService:
    """``timeout`` is the longest a generation may take, waiting included, in seconds.

    ``most_waiting`` requests may wait for others: for those of the same key or conversation, and
    for those that do the same work.
    ``key_lifetime`` is how long an ``Idempotency-Key`` means its first request.
    """

    def __init__(
        self,
        database: Database,
        models: ModelHost,
        content_filter: ContentFilter,
        lease: LeaseKeeper,
        live: LiveGenerations,
        cache: ResponseCache,
        timeout: float,
        key_lifetime: timedelta,
        most_waiting: int,
    ) -> None:
        self.database = database
        self.models = models
        self.content_filter = content_filter
        self.lease = lease
        self.live = live
        self.cache = cache
        self.timeout = timeout
        self.key_lifetime = key_lifetime
        self.places = Semaphore(most_waiting)
        self.turns = Turns()
        crowds = Crowds(database)
        self.accepter = Accepter(crowds, cache, lease)
        self.finisher = Finisher(database, crowds, lease)
        # A producer waits most of its life, and admission bounds how many there are.
        self.producers = ThreadPoolExecutor(models.capacity, thread_name_prefix="producer")

    def generate(
        self, session: Session, owner_id: str, request: GenerateRequest, key: Key | None = None
    ) -> Answer:
        """Answer a prompt with a stored record. Raises ServiceErrors."""
        ask = Ask(owner_id, request.prompt, request, finish_alone=True, once=once_of(key, request))
        return self.wait_for(session, self.continue_prompt(session, ask))

    def stream(
        self,
        session: Session,
        owner_id: str,
        request: GenerateRequest,
        finish_alone: bool,
        key: Key | None = None,
    ) -> Live | Answer:
        """Begin answering a prompt; a producer goes on alone. Raises ServiceErrors."""
        ask = Ask(owner_id, request.prompt, request, finish_alone, once=once_of(key, request))
        return self.let_go(self.continue_prompt(session, ask))

    def analyze(
        self,
        session: Session,
        owner_id: str,
        user_id: str,
        request: AnalyzeRequest,
        key: Key | None = None,
    ) -> Answer:
        """Continue a user's text, or answer it from the store. Raises ServiceErrors."""
        options = SamplingOptions(user_id=user_id, use_cache=request.use_cache)
        ask = Ask(owner_id, request.text, options, finish_alone=True, once=once_of(key, request))
        return self.wait_for(session, self.continue_prompt(session, ask))

    def continue_prompt(self, session: Session, ask: Ask) -> Live | Answer:
        def begin(first: GenerationRecord | None, patience: Patience) -> Live | Answer:
            return self.begin(
                session,
                ask,
                lambda model: plan_prompt(model, ask.prompt, ask.options),
                patience,
                again=first,
            )

        return self.once(session, ask, begin)

    def once(
        self,
        session: Session,
        ask: Ask,
        begin: Callable[[GenerationRecord | None, Patience], Live | Answer],
    ) -> Live | Answer:
        """Begin what was asked, unless its key was answered before.

        ``begin`` gets the record of a first try that was cut short, to run it again on its row.
        """
        with Patience(self.timeout, self.places) as patience:
            while patience.left():
                with self.turns.of(turn_of(ask), patience):
                    first = first_try(session, ask.owner_id, ask.once, self.key_lifetime)
                    if first is not None and not was_cut_short(first):
                        return Answer(first, replayed=True)
                    with contextlib.suppress(TakenError):
                        return begin(first, patience)
        raise DeadlineExceededError

    def begin(
        self,
        session: Session,
        ask: Ask,
        plan: "Callable[[LoadedModel], Plan]",
        patience: Patience,
        enter: Callable[[Session], None] = nothing,
        again: GenerationRecord | None = None,
    ) -> Live | Answer:
        """Validate, look into the store, take a place in the queue, store the prompt.

        ``enter`` is called in the transaction that stores it, and may refuse by raising. Raises
        TakenError when another request did the same meanwhile.
        """
        self.content_filter.check(ask.prompt)
        model, engine = self.models.running()
        planned = plan(model)
        cache_key = self.cache.key(ask, planned)
        if again is not None:
            planned = planned.seeded(again.seed)
            return self.start(session, ask, engine, planned, patience, enter, again, cache_key)
        if cache_key is None:
            return self.start(session, ask, engine, planned, patience, enter)
        with self.turns.of(cache_key, patience):
            found = self.answered(session, ask, cache_key, enter, patience)
            if found is not None:
                return Answer(found)
            return self.start(session, ask, engine, planned, patience, enter, cache_key=cache_key)

    def start(
        self,
        session: Session,
        ask: Ask,
        engine: "Engine",
        plan: Plan,
        patience: Patience,
        enter: Callable[[Session], None],
        again: GenerationRecord | None = None,
        cache_key: str | None = None,
    ) -> Live:
        """Take a place in the queue and store the prompt."""
        generation = admitted(engine, plan)
        try:
            record = self.accepter.accept(session, ask, plan, enter, again, cache_key)
        except BaseException:
            generation.cancel()
            raise
        live = Live(record, generation, ask.finish_alone, patience.deadline)
        self.live.add(live)
        return live

    def answered(
        self,
        session: Session,
        ask: Ask,
        cache_key: str,
        enter: Callable[[Session], None],
        patience: Patience,
    ) -> GenerationRecord | None:
        try:
            return self.cache.answer(session, ask, cache_key, enter, patience)
        except IntegrityError:  # its key is taken, or the text it would have shown is gone
            raise TakenError from None

    def wait_for(self, session: Session, begun: Live | Answer) -> Answer:
        """Run it here, where it is not answered yet. Raises ServiceErrors."""
        if isinstance(begun, Answer):
            found, replayed = outcome(begun.record), begun.replayed
        else:
            found, replayed = self.produce(session, begun), False
        if isinstance(found, ServiceError):
            raise found
        return Answer(found, replayed)

    def let_go(self, begun: Live | Answer) -> Live | Answer:
        """Run it in a producer's thread, where it is not answered yet."""
        if isinstance(begun, Live):
            self.producers.submit(self.produce_alone, begun)
        return begun

    def produce_alone(self, live: Live) -> None:
        with self.database.sessions() as session:
            self.produce(session, live)

    def produce(self, session: Session, live: Live) -> GenerationRecord | ServiceError:
        """Run a generation to its end, store that, and then tell whoever waits for it."""
        outcome: GenerationRecord | ServiceError = GenerationFailedError(record_id=live.record.id)
        try:
            with live.generation:
                ending = run(live)
            outcome = self.finisher.finish(session, live.record, ending, live.seconds())
        except ServiceError as error:
            outcome = error
        except Exception:
            log.exception("a generation was not finished")
        finally:
            self.live.end(live, outcome)
            if not isinstance(outcome, StorageUnavailableError):  # else it is to be stored yet
                self.lease.drop(live.record.id)
        return outcome


def run(live: Live) -> Ending:
    """How a generation ended, or was cancelled at its deadline."""
    error: type[ServiceError] | None = None
    try:
        live.generation.start()
        live.generation.result(live.seconds_left())
    except TimeoutError:
        live.generation.cancel()
        error = DeadlineExceededError
    except GenerationError:
        error = GenerationFailedError
    except EngineStoppedError:
        error = InterruptedGenerationError
    return ending_of(live.generation, error)


def turn_of(ask: Ask) -> str | None:
    return None if ask.once is None else f"{ask.owner_id} {ask.once.key}"


def admitted(engine: "Engine", plan: Plan) -> "Generation":
    """A place in the queue. Raises InvalidRequestError, OverloadedError, ModelNotReadyError."""
    try:
        return engine.admit(plan.prompt_ids, plan.params)
    except EngineFullError:
        raise OverloadedError from None
    except EngineStoppedError:
        raise ModelNotReadyError from None
    except ValueError as error:
        raise InvalidRequestError(f"The model cannot run this prompt: {error}.") from None
