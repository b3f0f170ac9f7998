"""A power cut loses nothing that was acknowledged; `python -m benchmarks.power_cut` is longer."""

from pathlib import Path

from benchmarks.power_cut import cut_power


def test_a_power_cut_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    counts = cut_power(tmp_path, cuts=15, seed=1)
    assert counts["checked"] > 100
    assert (counts["lost"], counts["corrupt"]) == (0, 0)


def test_the_simulation_would_show_a_loss(tmp_path: Path) -> None:
    assert cut_power(tmp_path, cuts=15, seed=1, control=True)["lost"] > 0
