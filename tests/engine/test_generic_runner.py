"""One sequence after the other, on the model's own cache."""

from typing import Any

import pytest
import torch

from engine.generic_runner import GenericRunner
from engine.scheduler import Plan
from tests.engine.architectures import MAMBA, PACKED, random_model
from tests.engine.conftest import made, prefilled


@pytest.mark.parametrize("config", [PACKED["mistral"], MAMBA], ids=["kv", "state"])
@torch.inference_mode()
def test_logits_are_those_of_the_whole_text_at_once(config: Any) -> None:
    model = random_model(config)
    runner = GenericRunner(model)
    sequences = [made(tokens, tokens) for tokens in (1, 20, 70)]
    for sequence in sequences:
        prefilled(runner, sequence)
    for token in range(3):
        for sequence in sequences:
            sequence.output_ids.append(token)
        logits = runner.forward(Plan(tuple(sequences), ()))
        for row, sequence in zip(logits, sequences, strict=True):
            ids = torch.tensor([[*sequence.prompt_ids, *sequence.output_ids]])
            torch.testing.assert_close(row, model(ids).logits[0, -1], atol=1e-3, rtol=1e-4)


@torch.inference_mode()
def test_a_step_run_again_gives_the_same() -> None:
    runner = GenericRunner(random_model(PACKED["llama"]))
    sequences = (made(5, 1), made(6, 2))
    for sequence in sequences:
        prefilled(runner, sequence)
        sequence.output_ids.append(3)
    first = runner.forward(Plan(sequences, ()))
    torch.testing.assert_close(runner.forward(Plan(sequences, ())), first, atol=1e-4, rtol=1e-4)
    for sequence in sequences:
        runner.free(sequence)
    assert runner.used == 0
