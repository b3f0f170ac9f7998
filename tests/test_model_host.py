"""What becomes of a model that does not come to run."""

import pytest
import torch

from services.model_host import ModelHost
from tests.engine.conftest import TINY


def test_a_model_that_cannot_be_run_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nMore of it")

    monkeypatch.setattr("engine.engine.runner_for", no_room)
    failures: list[bool] = []
    host = ModelHost(TINY, "float32", "cpu", 8, lambda: failures.append(True), lambda _: None)
    host.load()
    assert host.failure == (
        "the model was loaded but does not run: the engine could not be built"
        " (OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB)"
    )
    assert host.failure in caplog.text
    assert failures == [True]
    assert host.unready() == "it did not load"
