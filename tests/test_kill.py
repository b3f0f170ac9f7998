"""What was answered is there after SIGKILL. `make torture` is the long form, and has keys too."""

from pathlib import Path

from benchmarks.kill_test import torture
from benchmarks.promises import broken


def test_nothing_answered_is_lost_to_kills(tmp_path: Path) -> None:
    counts = torture(kills=1, clients=8, seed=1, folder=tmp_path)
    assert counts["kills"] == 1
    assert counts["answered"] > 0
    assert counts["records"] >= counts["answered"]
    assert broken(counts) == {}
