"""Several processes on one database, shortly; `python -m benchmarks.processes` is the long run."""

from pathlib import Path

import pytest

from benchmarks import processes
from benchmarks.promises import broken


@pytest.mark.parametrize(("kind", "services", "workers"), [("sqlite", 1, 2), ("postgresql", 2, 1)])
def test_processes_on_one_database_lose_nothing(
    kind: str, services: int, workers: int, tmp_path: Path
) -> None:
    counts = processes.run(kind, tmp_path, 16, 100, services, workers)
    assert counts["answered"] > 50
    assert broken(counts) == {}
