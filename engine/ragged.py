"""Steps whose rows are the tokens of many sequences, and what each row attends to.

What the batched runners share: each sequence's keys and values (kv_cache.py, prefix_store.py), the
rows of a step, and attention, which alone looks at one sequence at a time: the decoding ones arena
by arena, prompt chunks one by one. Everything is arranged so that a row's bits do not depend on
the others: see docs/decisions/0002-reproducible-batches.md. Knows no architecture, no sampling.
"""

import logging
import math
from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kv_cache import Arena, KVCache, Shape
from engine.linear import (
    Linear,
    RowCounts,
    Trial,
    cancelling,
    candidate_counts,
    counts_of_calls,
    counts_that_agree,
)
from engine.prefix_store import PrefixStore
from engine.scheduler import CHUNK, Chunk, Plan
from engine.sequence import Sequence, Status

log = logging.getLogger(__name__)

# Of a column of query positions and a row of key positions: who may look at whom.
Visible = Callable[[Tensor, Tensor], Tensor]


def causal(queries: Tensor, keys: Tensor) -> Tensor:
    return keys <= queries


@dataclass(frozen=True, slots=True)
class Limits:
    """What a runner is built for: see ``Engine``."""

    context_size: int
    max_running: int
    prefill_tokens: int
    prefix_bytes: int


@dataclass(frozen=True, slots=True)
class Rule:
    """How a layer weighs what it looks at; ``softcap`` bounds its scores."""

    scale: float
    softcap: float | None = None
    visible: Visible = causal


@dataclass(slots=True)
class Mask:
    """0 where a query may look, else -inf; made once a step for each rule that layers have."""

    positions: Tensor  # [queries, 1]
    length: int
    dtype: torch.dtype
    made: dict[Visible, Tensor] = field(default_factory=dict)

    def of(self, visible: Visible) -> Tensor:
        """[queries, length]"""
        if visible not in self.made:
            seen = visible(self.positions, torch.arange(self.length, device=self.positions.device))
            mask = torch.zeros(len(seen), self.length, dtype=self.dtype, device=seen.device)
            self.made[visible] = mask.masked_fill_(~seen, -math.inf)
        return self.made[visible]


@dataclass(slots=True)
class DecodeGroup:
    """Neighbouring rows of one arena, ``first`` to ``first + count``, which decode together."""

    arena: Arena
    first: int
    count: int
    mask: Mask  # [count * heads, length]
    slots: Tensor  # [count, 2, heads]: where new keys and new values go in an arena's layer


@dataclass(slots=True)
class PrefillPiece:
    """A prompt chunk."""

    chunk: Chunk
    stage: Tensor  # [2, layers, heads, prompt, width]: its prompt's keys and values so far
    mask: Mask  # [query heads that share a head * tokens, stop]


@dataclass(slots=True)
class Layout:
    """What each row of a step is: first those of ``decode``, then those of ``prefill``."""

    tokens: Tensor  # [rows], padded to a count the kernels agree on
    positions: Tensor  # [rows]
    decode: list[DecodeGroup]
    prefill: list[PrefillPiece]
    wanted: Tensor  # [sampled sequences, padded]: rows whose logits are asked for
    sampled: int


class RaggedRunner:
    """A runner but for ``forward``, which differs by kind.

    ``groups`` query heads share each of the heads of ``shape``. All rows of a step go through
    ``products``, and through what ``between`` tries; the sampled ones through ``head``.
    """

    def __init__(
        self,
        shape: Shape,
        groups: int,
        products: Rows[Linear],
        head: Linear,
        limits: Limits,
        between: Rows[Trial] = (),
    ) -> None:
        self.shape, self.groups = shape, groups
        self.cache = KVCache(shape, limits.context_size)
        self.stages: dict[Sequence, Tensor] = {}
        self.prefixes = PrefixStore(limits.prefix_bytes)
        self.reused: dict[Sequence, list[Tensor]] = {}  # found, and not yet in a stage
        self.reused_tokens = 0
        self.fuses = can_fuse(shape)
        steps = self._choose_step_counts(products, between, limits)
        heads = agreeing_calls([head], limits.max_running, limits.max_running)
        self.reproducible = bool(steps and heads)
        most = limits.max_running + limits.prefill_tokens
        self.rows = RowCounts(steps or candidate_counts(most))
        self.head_rows = RowCounts(heads or candidate_counts(limits.max_running))

    def _choose_step_counts(
        self, products: Rows[Linear], between: Rows[Trial], limits: Limits
    ) -> list[int]:
        """Row counts of steps that do not change a row's bits, as measured here and now; none
        where there are not enough."""
        most = limits.max_running + limits.prefill_tokens
        usual = max(limits.max_running, min(CHUNK, limits.prefill_tokens))
        calls = agreeing_calls(products, usual, most)
        if not calls:
            return []
        for product in products:
            product.most = calls[-1]
        counts = counts_that_agree(between, calls[-1], counts_of_calls(calls, most))
        return counts if counts and counts[-1] >= most else []

    @property
    def used(self) -> int:
        return self.cache.used + len(self.stages) + len(self.reused)

    def reuse(self, sequence: Sequence) -> int:
        if found := self.prefixes.find(sequence.prompt_ids):
            self.reused[sequence] = found
        return CHUNK * len(found)

    def free(self, sequence: Sequence, *, tainted: bool = False) -> None:
        stage = self.stages.pop(sequence, None)
        if stage is not None and sequence.status is Status.FINISHED:  # with its first token
            self._keep(sequence, stage)
        self.reused.pop(sequence, None)
        self.cache.free(sequence, tainted=tainted)

    # Attention.

    def attend(
        self, layout: Layout, layer: int, rule: Rule, queries: Tensor, both: Tensor
    ) -> Tensor:
        """Store the new keys and values, then let each row look at its own sequence's.

        ``queries`` is [rows, query heads, width], and so is what comes back; ``both`` keys and
        values are [rows, 2, heads, width].
        """
        out, rows = [], 0
        for group in layout.decode:
            mine = slice(rows, rows := rows + group.count)
            out.append(self._decode(group, layer, rule, queries[mine], both[mine]))
        for piece in layout.prefill:
            mine = slice(rows, rows := rows + piece.chunk.stop - piece.chunk.start)
            out.append(self._prefill(piece, layer, rule, queries[mine], both[mine]))
        if rows < len(queries):
            out.append(torch.zeros_like(queries[rows:]))
        return out[0] if len(out) == 1 else torch.cat(out)

    def _decode(
        self, group: DecodeGroup, layer: int, rule: Rule, queries: Tensor, both: Tensor
    ) -> Tensor:
        width, length = self.shape.width, group.arena.length
        size = group.count * self.shape.heads
        stored = group.arena.both[layer]
        stored.view(-1, width)[group.slots] = both
        rows = slice(group.first, group.first + group.count)
        keys, values = stored[:, rows].view(2, size, length, width)
        mask = group.mask.of(rule.visible)[:, None]
        asked = copied(queries).view(size, self.groups, width)
        given = [asked, keys, values, mask]
        if size == 1:  # a batch of one matrix gets another kernel, and with it other last bits
            given = [one.expand(2, -1, -1) for one in given]
        weighs = weigh_fused if self.fuses and rule.softcap is None else weigh
        return weighs(rule, *given)[:size].view_as(queries)

    def _prefill(
        self, piece: PrefillPiece, layer: int, rule: Rule, queries: Tensor, both: Tensor
    ) -> Tensor:
        start, stop = piece.chunk.start, piece.chunk.stop
        heads, width = self.shape.heads, self.shape.width
        stored = piece.stage[:, layer]
        stored[:, :, start:stop] = both.permute(1, 2, 0, 3)
        keys, values = stored
        mask = piece.mask.of(rule.visible)
        asked = copied(queries.transpose(0, 1)).view(heads, -1, width)
        out = weigh(rule, asked, keys[:, :stop], values[:, :stop], mask)
        return out.view(-1, stop - start, width).transpose(0, 1)

    # The rows of a step.

    def _lay_out(self, plan: Plan) -> Layout:
        tokens: list[int] = []
        positions: list[int] = []
        row_of: dict[Sequence, int] = {}
        decode = self._lay_out_decode(plan.decode, tokens, positions, row_of)
        prefill = []
        for chunk in plan.prefill:
            prefill.append(self._lay_out_chunk(chunk))
            tokens += chunk.sequence.prompt_ids[chunk.start : chunk.stop]
            positions += range(chunk.start, chunk.stop)
            row_of[chunk.sequence] = len(tokens) - 1
        wanted = [row_of[sequence] for sequence in plan.sampled]
        padding = [0] * (self.rows.pad(len(tokens)) - len(tokens))
        head_padding = [0] * (self.head_rows.pad(len(wanted)) - len(wanted))
        return Layout(
            tokens=self._tensor(tokens + padding),
            positions=self._tensor(positions + padding),
            decode=decode,
            prefill=prefill,
            wanted=self._tensor(wanted + head_padding),
            sampled=len(wanted),
        )

    def _lay_out_decode(
        self,
        sequences: Rows[Sequence],
        tokens: list[int],
        positions: list[int],
        row_of: dict[Sequence, int],
    ) -> list[DecodeGroup]:
        for sequence in sequences:
            if sequence in self.stages:
                self._settle(sequence)
            self.cache.reserve(sequence, len(sequence))
        places = sorted(
            (self.cache.arenas.index(arena), row, sequence)
            for sequence, (arena, row) in ((s, self.cache.places[s]) for s in sequences)
        )
        groups = []
        for arena_index, first, members in neighbours(places):
            at = len(tokens)
            for offset, sequence in enumerate(members):
                row_of[sequence] = at + offset
                tokens.append(sequence.output_ids[-1])
                positions.append(len(sequence) - 1)
            arena = self.cache.arenas[arena_index]
            groups.append(self._group(arena, first, positions[at:]))
        return groups

    def _settle(self, sequence: Sequence) -> None:
        """A prompt's keys and values go where decoding reads them.

        Not before it decodes: until then the step that ended the prompt may have to be run again.
        """
        stage = self.stages[sequence]
        self.cache.insert(sequence, stage[0], stage[1])
        del self.stages[sequence]
        self._keep(sequence, stage)

    def _keep(self, sequence: Sequence, stage: Tensor) -> None:
        try:
            self.prefixes.keep(sequence.prompt_ids, stage)
        except RuntimeError as error:  # out of memory: later prompts are computed anew, no more
            log.warning("a prompt was not kept for later ones (%s)", type(error).__name__)

    def _group(self, arena: Arena, first: int, positions: list[int]) -> DecodeGroup:
        heads, count = self.shape.heads, len(positions)
        last = self._tensor(positions).repeat_interleave(heads)
        rows = torch.arange(first * heads, (first + count) * heads, device=self.shape.device)
        keys = (rows * arena.length + last).view(count, heads)
        slots = torch.stack([keys, keys + arena.both[0, 0].numel() // self.shape.width], dim=1)
        mask = Mask(last[:, None], arena.length, self.shape.dtype)
        return DecodeGroup(arena, first, count, mask, slots)

    def _lay_out_chunk(self, chunk: Chunk) -> PrefillPiece:
        stage = self.stages.get(chunk.sequence)
        if stage is None:
            stage = self.stages[chunk.sequence] = self._stage(chunk.sequence)
        positions = self._tensor(list(range(chunk.start, chunk.stop)) * self.groups)
        return PrefillPiece(chunk, stage, Mask(positions[:, None], chunk.stop, self.shape.dtype))

    def _stage(self, sequence: Sequence) -> Tensor:
        shape = self.shape
        size = (2, shape.layers, shape.heads, len(sequence.prompt_ids), shape.width)
        stage = torch.empty(size, dtype=shape.dtype, device=shape.device)
        for index, found in enumerate(self.reused.pop(sequence, ())):
            stage[..., index * CHUNK : (index + 1) * CHUNK, :] = found
            self.reused_tokens += CHUNK
        return stage

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.shape.device)


def agreeing_calls(products: Rows[Linear], usual: int, most: int) -> list[int]:
    """Row counts up to ``most`` at which each of ``products`` gives a row the bits that it has
    among ``usual`` rows or a few more."""
    counts = candidate_counts(most)
    kinds = {(p.out_features, p.in_features, p.bias is None, p.gelu): p for p in products}
    trials = [partial(cancelling, product) for product in kinds.values()]
    return counts_that_agree(trials, RowCounts(counts).pad(usual), counts)


def can_fuse(shape: Shape) -> bool:
    """Whether decoding attends faster in one kernel: a third with matrix units, while without
    them its bfloat16 is seven times slower, and in float32 its bits depended on the batch there."""
    on_processor = shape.device.type == "cpu" and shape.dtype is torch.bfloat16
    return on_processor and torch.cpu._is_amx_tile_supported()


def weigh_fused(rule: Rule, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """What ``weigh`` computes, but for softcaps."""
    out = F.scaled_dot_product_attention(
        queries[None], keys[None], values[None], mask[None], scale=rule.scale
    )
    return out[0]


def copied(queries: Tensor) -> Tensor:
    """Always: where a view lies, and so its product's last bits, depends on the step."""
    return queries.clone(memory_format=torch.contiguous_format)


def weigh(rule: Rule, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention of [batch, queries, width] to [batch, length, width]."""
    scores = torch.bmm(queries, keys.transpose(1, 2))
    if rule.softcap is None:
        scores = torch.add(mask, scores, alpha=rule.scale)  # sooner done than by baddbmm
    else:
        scores = scores.mul_(rule.scale / rule.softcap).tanh_().mul_(rule.softcap).add_(mask)
    return torch.bmm(torch.softmax(scores, -1), values)


def neighbours(
    places: list[tuple[int, int, Sequence]],
) -> list[tuple[int, int, list[Sequence]]]:
    """Sorted (arena, row, sequence) as runs of adjacent rows: (arena, first row, sequences)."""
    runs: list[tuple[int, int, list[Sequence]]] = []
    for arena, row, sequence in places:
        if runs and runs[-1][0] == arena and runs[-1][1] + len(runs[-1][2]) == row:
            runs[-1][2].append(sequence)
        else:
            runs.append((arena, row, [sequence]))
    return runs
