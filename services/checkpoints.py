"""Writes running texts into their rows as they grow, all together, and looks for cancellations.

What a follower saw more than a second before a crash is in the row. Where nobody has looked yet,
as while a client waits for one whole answer, the text is kept all the same, but less often: for 32
such at once, twice a second would cost 3 % of the tokens.
"""

import time

from database import Database, transaction
from repositories import records
from services.generation import GenerationService
from services.leases import LeaseKeeper
from services.live import Live, LiveGenerations

CHECKPOINT_SECONDS = 0.5
UNSEEN_SECONDS = 5.0


class Checkpointer:
    def __init__(
        self,
        database: Database,
        lease: LeaseKeeper,
        live: LiveGenerations,
        generation: GenerationService,
    ) -> None:
        self.database = database
        self.lease = lease
        self.live = live
        self.generation = generation

    def tick(self) -> None:
        """One commit for all texts that have grown; nothing where nothing runs for long."""
        self.generation.finisher.store_unstored()
        running = [live for live in self.live.all() if live.seconds() > CHECKPOINT_SECONDS]
        if not running:
            return
        due = filter(is_due, running)
        grown = {live: found for live in due if (found := new_text(live)) is not None}
        with self.database.sessions() as session:
            if grown:
                with transaction(session):
                    records.checkpoint(
                        session,
                        [(live.record.id, text, tokens) for live, (text, tokens) in grown.items()],
                    )
            self.live.cancel(records.to_cancel(session, self.lease.lease_id))
        for live, found in grown.items():
            live.checkpointed, live.checkpointed_at = len(found[0]), time.monotonic()


def is_due(live: Live) -> bool:
    """Whether its text is to be written now, if it has grown."""
    return live.seen or time.monotonic() - live.checkpointed_at > UNSEEN_SECONDS


def new_text(live: Live) -> tuple[str, int] | None:
    """The text and its number of tokens, if more of it is known than was stored."""
    snapshot = live.generation.snapshot()
    grown = len(snapshot.text) > live.checkpointed
    return (snapshot.text, len(snapshot.token_ids)) if grown else None
