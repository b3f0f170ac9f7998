"""Writes running texts into their rows as they grow, all together, and stops what is not wanted.

What a follower saw more than a second before a crash is in the row. Where nobody has looked yet,
as while a client waits for one whole answer, the text is kept all the same, but less often: for 32
such at once, twice a second would cost 3 % of the tokens.
"""

import time
from collections.abc import Sequence

from sqlalchemy.orm import Session

from database import Database, release, transaction
from engine.sampling import FinishReason
from repositories import records
from repositories.records import Grown
from services.generation import GenerationService
from services.live import Live, LiveGenerations

CHECKPOINT_SECONDS = 0.5
UNSEEN_SECONDS = 5.0


class Checkpointer:
    def __init__(
        self,
        database: Database,
        live: LiveGenerations,
        generation: GenerationService,
    ) -> None:
        self.database = database
        self.live = live
        self.generation = generation

    def tick(self) -> None:
        """One commit for all texts that have grown; nothing where nothing runs for long.

        What was refused before comes last, and cancellations first: neither waits for a text that
        the database does not take.
        """
        running = [live for live in self.live.all() if live.seconds() > CHECKPOINT_SECONDS]
        if running:
            with self.database.sessions() as session:
                self.write(session, stop_unwanted(session, running))
        self.generation.finisher.store_unstored()

    def write(self, session: Session, running: Sequence[Live]) -> None:
        due = filter(is_due, running)
        grown = {live: found for live in due if (found := new_text(live)) is not None}
        if not grown:
            return
        with transaction(session):
            records.checkpoint(session, list(grown.values()))
        for live, found in grown.items():
            live.checkpointed, live.checkpointed_at = len(found.text), time.monotonic()


def stop_unwanted(session: Session, running: Sequence[Live]) -> list[Live]:
    """Stop those that somebody cancelled or deleted, or that another process closed, for whatever
    the model makes of them is in vain; the rest goes on."""
    wanted = records.wanted(session, [live.record.id for live in running])
    release(session)
    going_on = []
    for live in running:
        if (live.record.id, live.record.attempts) in wanted:
            going_on.append(live)
        else:
            live.generation.cancel(FinishReason.CANCELLED)
    return going_on


def is_due(live: Live) -> bool:
    """Whether its text is to be written now, if it has grown."""
    return live.seen or time.monotonic() - live.checkpointed_at > UNSEEN_SECONDS


def new_text(live: Live) -> Grown | None:
    """What is known of the text, if that is more than was stored."""
    snapshot = live.generation.snapshot()
    if len(snapshot.text) <= live.checkpointed:
        return None
    tokens = len(snapshot.token_ids)
    return Grown(live.record.id, snapshot.text, tokens, live.record.attempts)
