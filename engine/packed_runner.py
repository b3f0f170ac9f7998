"""Runs a Hugging Face causal language model on its own ``forward``, all tokens of a step in one
row: every sequence shares every matrix product.

It takes only models that are seen to be fit (row_model.py) and that then give, on the weights that
were loaded, what they give one sequence at a time. Rows, attention, keys and values are those of
ragged.py. Knows no architecture.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.generic_runner import GenericRunner, close
from engine.prefix_store import PrefixStore
from engine.ragged import Limits, RaggedRunner
from engine.row_model import RowModel, Survey, UnsuitedError, pack
from engine.sampling import SamplingParams
from engine.scheduler import CHUNK, Chunk, Plan
from engine.sequence import Sequence

log = logging.getLogger(__name__)

REHEARSED = 3  # sequences


class PackedRunner(RaggedRunner):
    """Raises UnsuitedError for a model that it would not run right."""

    @torch.inference_mode()
    def __init__(self, model: Any, limits: Limits) -> None:
        survey = Survey(model, limits.context_size)
        self.vocabulary = model.config.get_text_config().vocab_size
        plans = partial(rehearsal, self.vocabulary, limits.context_size)
        one_by_one = GenericRunner(model)
        expected = [one_by_one.forward(plan) for plan in plans()]
        self.row_model, self.context_size = RowModel(model), limits.context_size
        products = {module: pack(module) for module in survey.products}
        head = products.pop(survey.head)
        super().__init__(
            survey.shape,
            survey.groups,
            [*products.values()],
            head,
            replace(
                limits,
                max_running=max(REHEARSED, limits.max_running),
                prefill_tokens=max(2 * CHUNK, limits.prefill_tokens),
            ),
            [self._between_layers],
        )
        self._rehearse(plans(), expected)
        self.prefixes = PrefixStore(limits.prefix_bytes)  # without what was rehearsed

    @torch.inference_mode()
    def forward(self, plan: Plan) -> Tensor:
        layout = self._lay_out(plan)
        attend = partial(self.attend, layout)
        logits = self.row_model(layout.tokens, layout.positions, layout.wanted, attend)
        return logits[: layout.sampled]

    def _between_layers(self, rows: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """A trial of all that rows go through from one layer's attention to the next: norms,
        activations and rotations may round otherwise at some row counts, as products may."""
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.vocabulary, (rows,), generator=generator)
        sample = torch.stack([tokens, torch.arange(rows) % self.context_size], dim=1)
        return self.row_model.up_to_second_layer, sample.to(self.shape.device)

    def _rehearse(self, plans: Iterator[Plan], expected: list[Tensor]) -> None:
        """Run sequences that come, grow and meet, and compare."""
        for plan, reference in zip(plans, expected, strict=True):
            together = self.forward(plan)
            if not close(together, reference):
                raise UnsuitedError("its logits differ from those of one sequence at a time")
            alone = torch.cat([self.forward(part) for part in plan.apart()])
            self.reproducible &= torch.equal(together, alone)
        for sequence in plan.sequences:
            self.free(sequence)
        if self.reproducible:
            return
        if self.shape.device.type == "cpu":
            raise UnsuitedError("its numbers depend on what else a step computes")
        log.warning("matrix products here depend on the batch: runs may not repeat exactly")


def rehearsal(vocabulary: int, context_size: int) -> Iterator[Plan]:
    """Steps of three sequences, the last of all three; each plan is for running at once."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=generator).tolist()

    def made(length: int) -> Sequence:
        prompt = tokens(min(length, context_size - REHEARSED))
        return Sequence(tuple(prompt), SamplingParams(REHEARSED, seed=0))

    first, second, third = made(CHUNK + 6), made(5), made(20)
    length = len(first)
    yield Plan((), (Chunk(first, 0, min(CHUNK, length)), Chunk(second, 0, len(second))))
    second.output_ids += tokens(1)
    rest = (Chunk(first, CHUNK, length),) if length > CHUNK else ()
    yield Plan((second,), (*rest, Chunk(third, 0, len(third))))
    for _ in range(2):
        for sequence in (first, second, third):
            sequence.output_ids += tokens(1)
        yield Plan((first, second, third), ())
