"""What runs is written down: what somebody has seen at once, what nobody has seen now and then."""

import asyncio
from typing import Any, cast

from engine.engine import Engine
from engine.loading import load_model
from models import GenerationRecord
from services.checkpoints import UNSEEN_SECONDS, is_due
from services.live import Live
from tests.engine.conftest import TINY, greedy


def test_a_text_that_nobody_has_seen_is_written_less_often() -> None:
    live = Live(GenerationRecord(), cast(Any, None), finish_alone=True)
    assert not is_due(live)
    live.checkpointed_at -= UNSEEN_SECONDS
    assert is_due(live)


def test_a_text_that_somebody_has_seen_is_written_each_time() -> None:
    engine = Engine(load_model(TINY, "float32", "cpu"))
    try:
        generation = engine.admit(engine.loaded.encode("Once upon a time"), greedy(20))
        live = Live(GenerationRecord(), generation, finish_alone=True)
        generation.start()
        generation.result(60)
        asyncio.run(one_look(live))
        assert is_due(live)
    finally:
        engine.close(10)


async def one_look(live: Live) -> None:
    pieces = live.follow(0)
    assert await anext(pieces)
    await pieces.aclose()
