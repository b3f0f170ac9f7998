"""What was answered is there after SIGKILL, once. `make torture` is the long form."""

from pathlib import Path

from benchmarks import once_test
from benchmarks.kill_test import torture
from benchmarks.promises import broken


def test_nothing_answered_is_lost_to_kills(tmp_path: Path) -> None:
    counts = torture(kills=1, clients=8, seed=1, folder=tmp_path)
    assert counts["kills"] == 1
    assert counts["answered"] > 0
    assert counts["records"] >= counts["answered"]
    assert broken(counts) == {}


def test_nothing_is_done_twice_for_a_key_over_kills(tmp_path: Path) -> None:
    counts = once_test.torture(kills=1, keys=4, clients=4, seed=1, folder=tmp_path)
    assert counts["records"] == 4
    assert broken(counts) == {}
