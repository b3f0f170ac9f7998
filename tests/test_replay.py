"""Records run again beside others, over HTTP."""

from benchmarks.replay_test import replays
from tests.service import Server


def test_records_made_in_a_crowd_come_out_the_same_beside_others(server: Server) -> None:
    assert replays(server.url, 16) == {"identical": 16}
