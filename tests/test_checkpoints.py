"""What runs is written down: what somebody has seen at once, what nobody has seen now and then."""

from typing import Any, cast

from models import GenerationRecord
from services.checkpoints import UNSEEN_SECONDS, is_due
from services.live import Live


def test_a_text_that_nobody_has_seen_is_written_less_often() -> None:
    live = Live(GenerationRecord(), cast(Any, None), finish_alone=True)
    assert not is_due(live)
    live.checkpointed_at -= UNSEEN_SECONDS
    assert is_due(live)


def test_a_text_that_somebody_has_seen_is_written_each_time() -> None:
    live = Live(GenerationRecord(), cast(Any, None), finish_alone=True)
    live.seen = True
    assert is_due(live)
