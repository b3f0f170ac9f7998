"""Faults of the database under load, shortly; `python -m benchmarks.faults` is the long run."""

import os
from pathlib import Path

import pytest

from benchmarks import faults, redis_test
from benchmarks.promises import broken


@pytest.mark.parametrize(("fault", "times"), [("postgresql", 1), ("mariadb", 1), ("replaced", 1)])
def test_a_fault_of_the_database_loses_nothing(fault: str, times: int, tmp_path: Path) -> None:
    counts = faults.FAULTS[fault](tmp_path, times)
    assert counts["200"] > 0
    assert broken(counts) == {}


def test_a_lock_beyond_the_patience_loses_nothing(tmp_path: Path) -> None:
    # Longer than an ending is tried for: that takes three times the patience and its pauses.
    counts = faults.locked(tmp_path, 1, seconds=8.0, patience=0.5)
    assert counts["503 storage_unavailable"] > 0
    assert broken(counts) == {}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make a file system")
def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    counts = faults.full(tmp_path, 1)
    assert counts["503 storage_unavailable"] > 0
    assert broken(counts) == {}


def test_a_redis_that_dies_and_lies_costs_time_alone(tmp_path: Path) -> None:
    counts = redis_test.torture(1, tmp_path)
    assert counts["lies"] > 0
    assert counts["cached"] > counts["works"] > 0
    assert broken(counts) == {}
