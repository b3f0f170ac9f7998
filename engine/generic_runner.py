"""Runs any Hugging Face causal language model on its own ``forward``, one sequence at a time.

Each sequence has its own Transformers cache, of whatever kind its architecture wants, so this is
right for every model and independent of what else runs; it shares no matrix product. Knows no
architecture.
"""

from typing import Any

import torch
from torch import Tensor

from engine.scheduler import Plan
from engine.sequence import Sequence


class GenericRunner:
    reproducible = True

    def __init__(self, model: Any) -> None:
        self.model = model
        self.reused_tokens = 0
        # A cache and how many tokens it holds: a step that raised may have grown it.
        self.caches: dict[Sequence, tuple[Any, int]] = {}

    def forward(self, plan: Plan) -> Tensor:
        rows = [self._run(s, len(s) - 1, len(s)) for s in plan.decode]
        for chunk in plan.prefill:
            logits = self._run(chunk.sequence, chunk.start, chunk.stop)
            if chunk.ends_prompt:
                rows.append(logits)
        return torch.stack(rows) if rows else torch.empty(0, 0)

    def reuse(self, sequence: Sequence) -> int:  # noqa: ARG002
        return 0

    def free(self, sequence: Sequence, *, tainted: bool = False) -> None:  # noqa: ARG002
        self.caches.pop(sequence, None)

    @property
    def used(self) -> int:
        return len(self.caches)

    def _run(self, sequence: Sequence, start: int, stop: int) -> Tensor:
        """Logits [vocabulary] after token ``stop - 1``."""
        cache, held = self.caches.pop(sequence, (None, 0))
        if held != start:
            cache, start = None, 0
        tokens = (*sequence.prompt_ids, *sequence.output_ids)[start:stop]
        ids = torch.tensor([tokens], device=self.model.device)
        out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        if out.past_key_values is not None:
            self.caches[sequence] = (out.past_key_values, stop)
        return out.logits[0, -1]  # type: ignore[no-any-return]
