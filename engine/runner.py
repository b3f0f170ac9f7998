"""What the engine asks of a model, and which of the two ways to run it a model gets."""

from typing import Protocol

from torch import Tensor

from engine.generic_runner import GenericRunner
from engine.gpt2_runner import GPT2Runner
from engine.loading import LoadedModel
from engine.scheduler import Plan
from engine.sequence import Sequence


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


def runner_for(
    loaded: LoadedModel, *, max_running: int, prefill_tokens: int, prefix_bytes: int
) -> Runner:
    """GPT-2 has its own; every other causal language model runs on its own ``forward``."""
    if GPT2Runner.takes(loaded.model):
        return GPT2Runner(
            loaded.model,
            context_size=loaded.context_size,
            max_running=max_running,
            prefill_tokens=prefill_tokens,
            prefix_bytes=prefix_bytes,
        )
    return GenericRunner(loaded.model)
