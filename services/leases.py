"""Which process runs which record, and what becomes of the records of a process that died.

Every process has a row in ``leases``; a record in progress carries its process's id. A lease is
dead when its process is gone (seen from the same machine), or when it has not beaten while this
process beat several times. Beats are counted, not clocks compared: a database that takes no writes
stops the judge along with the judged, and a clock that jumps says nothing. Nobody beats while no
record is in progress, so an idle service does not write.
"""

import logging
import os
from contextlib import suppress
from pathlib import Path

from sqlalchemy.orm import Session

import metrics
from database import Database, transaction
from errors import StorageUnavailableError
from log import event
from models import Lease
from repositories import leases, records
from services.ticker import Ticker

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
SILENT_BEATS = 5  # of ours, without one of theirs


def this_machine() -> str:
    """The boot and the process-id namespace, within which a process id means something."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    return ""


def process_identity(pid: int) -> str:
    """The process id and when it started, in ticks since boot; empty when there is none."""
    with suppress(OSError):
        status = Path(f"/proc/{pid}/stat").read_text()
        state, *rest = status.rpartition(")")[2].split()
        return "" if state == "Z" else f"{pid}/{rest[18]}"
    return ""


class LeaseKeeper:
    """Holds this process's lease and closes the records of dead ones, in a thread of its own."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.machine = this_machine()
        self.process = process_identity(os.getpid()) or str(os.getpid())
        self.lease_id = 0
        self.silence: dict[int, tuple[int, int]] = {}  # lease: its last beat, ours since then
        self.ticker = Ticker("leases", BEAT_SECONDS, self.tick)

    def start(self) -> None:
        """Take a lease, close what died on this machine, and go on looking."""
        self.sweep()
        self.ticker.start()

    def stop(self) -> None:
        self.ticker.stop()
        with (
            suppress(StorageUnavailableError),
            self.database.sessions() as session,
            transaction(session),
        ):
            leases.remove(session, [self.lease_id])

    def beat(self) -> None:
        """A real write that harms nothing. Raises StorageUnavailableError."""
        with self.database.sessions() as session, transaction(session):
            self.beat_in(session)

    def beat_in(self, session: Session) -> None:
        """Show that this process lives; take a new lease where it has none."""
        if not leases.beat(session, self.lease_id):
            self.lease_id = leases.add(session, self.machine, self.process).id

    def tick(self) -> None:
        with self.database.sessions() as session:
            held = records.open_leases(session)
        if held:
            self.sweep()
        else:
            self.silence.clear()

    def sweep(self) -> None:
        """Beat, and close the records of every lease that is found dead in the same transaction."""
        with self.database.sessions() as session, transaction(session):
            self.beat_in(session)
            others = leases.others(session, self.lease_id)
            known = {lease.id for lease in others} | {self.lease_id}
            dead = {lease.id for lease in others if self.is_dead(lease)}
            dead |= records.open_leases(session) - known
            if not dead:
                return
            closed = records.interrupt(session, sorted(dead))
            leases.remove(session, dead)
        metrics.INTERRUPTED.inc(closed)
        if closed:
            event(log, logging.WARNING, "closed records of dead processes", records=closed)

    def is_dead(self, lease: Lease) -> bool:
        if self.machine and lease.machine == self.machine:
            return process_identity(int(lease.process.partition("/")[0])) != lease.process
        beat, silent = self.silence.get(lease.id, (lease.beat, -1))
        silent = silent + 1 if beat == lease.beat else 0
        self.silence[lease.id] = (lease.beat, silent)
        return silent >= SILENT_BEATS
