"""What was answered is there after SIGKILL, once. `make torture` is the long form."""

from pathlib import Path

from benchmarks import kill_test, once_test
from benchmarks.promises import broken


def test_nothing_answered_is_lost_to_kills(tmp_path: Path) -> None:
    counts = kill_test.torture(kills=2, clients=8, seed=1, folder=tmp_path)
    assert counts["kills"] == 2
    assert counts["answered"] > 0
    assert counts["records"] >= counts["answered"]
    assert broken(counts) == {}


def test_nothing_is_done_twice_for_a_key_over_kills(tmp_path: Path) -> None:
    counts = once_test.torture(kills=1, keys=8, clients=4, seed=1, folder=tmp_path)
    assert counts["records"] == 8
    assert broken(counts) == {}
