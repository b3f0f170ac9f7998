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

CACHES = ("past_key_values", "cache_params", "state")  # what architectures call theirs

# How far logits of the same tokens may be apart, in parts of their own spread: all of them round.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


class GenericRunner:
    reproducible = True

    def __init__(self, model: Any) -> None:
        self.model = model
        self.reused_tokens = 0
        # A cache and how many tokens it holds: a step that raised may have grown it.
        self.caches: dict[Sequence, tuple[dict[str, Any], int]] = {}
        self.prepares = self._prepares()
        self.continues = self._continues()

    def forward(self, plan: Plan) -> Tensor:
        rows = [self._run(s, len(s) - 1, len(s)) for s in plan.decode]
        for chunk in plan.prefill:
            if chunk.ends_prompt:
                start = chunk.start if self.continues else 0
                rows.append(self._run(chunk.sequence, start, chunk.stop))
            elif self.continues:
                self._run(chunk.sequence, chunk.start, chunk.stop)
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
        cache, held = self.caches.pop(sequence, ({}, 0))
        if held != start:
            cache, start = {}, 0
        tokens = (*sequence.prompt_ids, *sequence.output_ids)[start:stop]
        logits, cache = self._forward(tokens, cache)
        if cache:
            self.caches[sequence] = (cache, stop)
        return logits

    def _forward(
        self, tokens: tuple[int, ...], cache: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        ids = torch.tensor([tokens], device=self.model.device)
        given = self.model.prepare_inputs_for_generation(ids) if self.prepares else {}
        out = self.model(**{"input_ids": ids, **given}, use_cache=True, logits_to_keep=1, **cache)
        return out.logits[0, -1], {name: out[name] for name in CACHES if name in out}

    def _prepares(self) -> bool:
        """Whether ``generate`` has it predict not after the last token but in the place of one put
        behind that, as XLNet is trained. Such a model keeps no cache here."""
        ids = torch.tensor([[1, 2, 3]], device=self.model.device)
        try:
            given = self.model.prepare_inputs_for_generation(ids)
        except Exception:  # it wants to be told more: an ordinary one, so far
            return False
        return bool(given["input_ids"].shape[1] > ids.shape[1])

    def _continues(self) -> bool:
        """Whether several tokens can go on from a cache: many recurrent states take but one, and
        forget what they held."""
        whole, _ = self._forward((1, 2, 3, 4, 5, 6), {})
        _, cache = self._forward((1, 2, 3), {})
        rest, _ = self._forward((4, 5, 6), cache) if cache else (whole, None)
        return close(rest, whole)


def close(logits: Tensor, reference: Tensor) -> bool:
    """Whether each row is the reference's but for rounding."""
    spread = reference.float().std(dim=-1)
    error = (logits - reference).float().square().mean(dim=-1).sqrt()
    return bool((error <= TOLERANCE[reference.dtype] * spread).all())
