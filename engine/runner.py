"""What the engine asks of a model, and which of the three ways to run it a model gets."""

import logging
from typing import Protocol

from torch import Tensor

from engine.generic_runner import GenericRunner
from engine.gpt2_runner import GPT2Runner
from engine.loading import LoadedModel
from engine.packed_runner import PackedRunner
from engine.ragged import Limits
from engine.row_model import UnsuitedError
from engine.scheduler import Plan
from engine.sequence import Sequence

log = logging.getLogger(__name__)


class Runner(Protocol):
    reused_tokens: int
    reproducible: bool  # a sequence's logits have the same bits whatever else a step computes

    def forward(self, plan: Plan) -> Tensor:
        """One step: logits [len(plan.sampled), vocabulary], in that order.

        Running a plan again, or a part of it, before its tokens are appended changes nothing.
        """
        ...

    def reuse(self, sequence: Sequence) -> int:
        """How many of its first tokens need not be computed, because an earlier prompt's were."""
        ...

    def free(self, sequence: Sequence, *, tainted: bool = False) -> None:
        """Forget what is kept for it, if anything. ``tainted``: it may hold NaN or infinity."""
        ...

    @property
    def used(self) -> int:
        """Sequences that something is kept for."""
        ...


def runner_for(loaded: LoadedModel, limits: Limits) -> Runner:
    """GPT-2 has its own; every other causal language model runs on its own ``forward``, with all
    tokens of a step in one row where that gives what they give alone."""
    if GPT2Runner.takes(loaded.model):
        return GPT2Runner(loaded.model, limits)
    try:
        return PackedRunner(loaded.model, limits)
    except UnsuitedError as error:
        log.warning("%s runs one sequence at a time: %s", loaded.name, error)
    return GenericRunner(loaded.model)
