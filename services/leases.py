"""Which process runs which record, and what becomes of the records of a process that died.

Every process has a row in ``leases``; a record in progress carries its process's id. A lease is
dead when its process is gone (seen from the same machine), or when it has not beaten while this
process beat several times. Beats are counted, not clocks compared: a database that takes no writes
stops the judge along with the judged, and a clock that jumps says nothing. Nobody beats while no
record is in progress, so an idle service does not write. A record of this very process that it
does not run is closed as well.
"""

import logging
import os
import threading
from collections import Counter
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


def is_gone(lease: Lease) -> bool:
    """Whether a process of this machine has ended."""
    return process_identity(int(lease.process.partition("/")[0])) != lease.process


class LeaseKeeper:
    """Holds this process's lease and closes the records of dead ones, in a thread of its own."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.machine = this_machine()
        self.process = process_identity(os.getpid()) or str(os.getpid())
        self.lease_id = 0
        self.silence: dict[int, tuple[int, int]] = {}  # lease: its last beat, ours since then
        self.running: Counter[int] = Counter()  # records that this process runs
        self.running_lock = threading.Lock()
        self.suspects: set[int] = set()
        self.ticker = Ticker("leases", BEAT_SECONDS, self.tick)

    def start(self) -> None:
        """Take a lease, close what died on this machine, and go on looking."""
        if not self.database.damaged:
            self.sweep()
        self.ticker.start()

    def stop(self) -> None:
        """Give the lease back, and close what is open still: nobody else would before a start."""
        self.ticker.stop()
        with (
            suppress(StorageUnavailableError),
            self.database.sessions() as session,
            transaction(session),
        ):
            records.interrupt(session, [self.lease_id])
            leases.remove(session, [self.lease_id])

    def hold(self, record_id: int) -> int:
        """This process runs the record, from before it is committed until it is dropped."""
        with self.running_lock:
            self.running[record_id] += 1
        return record_id

    def drop(self, record_id: int) -> None:
        # Counted: where an insert was rolled back, SQLite gives its id to the next one.
        with self.running_lock:
            self.running[record_id] -= 1
            self.running += Counter()  # forget what is at zero

    def lost(self, session: Session, lease_id: int) -> set[int]:
        """Open records of this process that it does not run, this time and the last time.

        Such are left by a commit that took effect though it failed, or by a defect.
        """
        opened = records.open_of(session, lease_id)
        with self.running_lock:
            found = opened - self.running.keys()
        before, self.suspects = self.suspects, found
        return found & before

    def beat(self) -> None:
        """A real write that harms nothing. Raises StorageUnavailableError."""
        with self.database.sessions() as session, transaction(session):
            lease_id = self.beat_in(session)
        self.lease_id = lease_id

    def beat_in(self, session: Session) -> int:
        """Show that this process lives; its lease, which is a new one where it had none.

        That is its own once it is committed: SQLite gives an id that was taken back to the next.
        """
        if leases.beat(session, self.lease_id):
            return self.lease_id
        return leases.add(session, self.machine, self.process).id

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
            lease_id = self.beat_in(session)
            closed = self.close_others(session, lease_id)
        self.lease_id = lease_id
        metrics.INTERRUPTED.inc(closed)
        if closed:
            event(log, logging.WARNING, "closed records of dead processes", records=closed)

    def close_others(self, session: Session, lease_id: int) -> int:
        """Close what nobody runs any more; how many records."""
        others = leases.others(session, lease_id)
        known = {lease.id for lease in others} | {lease_id}
        dead = {lease.id for lease in others if self.is_dead(lease)}
        dead |= records.open_leases(session) - known
        lost = self.lost(session, lease_id)
        if not dead and not lost:
            return 0
        closed = records.interrupt(session, sorted(dead), sorted(lost))
        leases.remove(session, dead)
        return closed

    def is_dead(self, lease: Lease) -> bool:
        if self.machine and lease.machine == self.machine:
            return is_gone(lease)
        beat, silent = self.silence.get(lease.id, (lease.beat, -1))
        silent = silent + 1 if beat == lease.beat else 0
        self.silence[lease.id] = (lease.beat, silent)
        return silent >= SILENT_BEATS
