"""Runs GPT-2: every token of a step, of whatever sequence, is a row of the same matrix products.

Only attention looks at one sequence at a time: the decoding ones arena by arena (kv_cache.py),
prompt chunks one by one. Everything is arranged so that a row's bits do not depend on the others:
see docs/decisions/0002-reproducible-batches.md. Knows no sampling, no text.
"""

import logging
import math
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel

from engine.kv_cache import Arena, KVCache, Shape
from engine.linear import Linear, RowCounts, agreeing_counts, cancelling, candidate_counts
from engine.prefix_store import PrefixStore
from engine.scheduler import CHUNK, Chunk, Plan
from engine.sequence import Sequence, Status

log = logging.getLogger(__name__)

GELU_TANH = {"gelu_new", "gelu_pytorch_tanh"}  # two spellings of one function


class Block:
    """The weights of one transformer layer; Transformers' Conv1D keeps them as [in, out]."""

    def __init__(self, source: Any) -> None:
        self.norm_1, self.norm_2 = source.ln_1, source.ln_2
        self.qkv = Linear(source.attn.c_attn.weight.t(), source.attn.c_attn.bias)
        self.out = Linear(source.attn.c_proj.weight.t(), source.attn.c_proj.bias)
        self.up = Linear(source.mlp.c_fc.weight.t(), source.mlp.c_fc.bias, gelu=True)
        self.down = Linear(source.mlp.c_proj.weight.t(), source.mlp.c_proj.bias)


@dataclass(slots=True)
class DecodeGroup:
    """Neighbouring rows of one arena, which decode together: rows ``first`` to ``first + count``
    of the arena, rows ``at`` to ``at + count`` of the step."""

    arena: Arena
    first: int
    count: int
    at: int
    mask: Tensor  # [count * heads, 1, length]: 0 where there is a token, else -inf
    slots: Tensor  # [2 * count * heads]: where new keys, then new values, go in an arena's layer


@dataclass(slots=True)
class PrefillPiece:
    """A prompt chunk: rows ``at`` and following of the step."""

    chunk: Chunk
    at: int
    stage: Tensor  # [2, layers, heads, prompt, width]: its prompt's keys and values so far
    mask: Tensor  # [tokens, stop]: 0 where a token may look, else -inf


@dataclass(slots=True)
class Layout:
    """What each row of a step is."""

    tokens: Tensor  # [rows], padded to a count the kernels agree on
    positions: Tensor  # [rows]
    decode: list[DecodeGroup]
    prefill: list[PrefillPiece]
    wanted: Tensor  # [sampled sequences, padded]: rows whose logits are asked for
    sampled: int


class GPT2Runner:
    @staticmethod
    def takes(model: Any) -> bool:
        """Whether it is GPT-2 as this runner computes it, with none of the rarer options."""
        if not isinstance(model, GPT2LMHeadModel):
            return False
        config = model.config
        return (
            config.activation_function in GELU_TANH
            and config.scale_attn_weights
            and not config.scale_attn_by_inverse_layer_idx
            and not config.reorder_and_upcast_attn
            and not config.add_cross_attention
        )

    @torch.inference_mode()
    def __init__(
        self,
        model: Any,
        *,
        context_size: int,
        max_running: int,
        prefill_tokens: int,
        prefix_bytes: int,
    ) -> None:
        body, config = model.transformer, model.config
        self.heads, self.width = config.n_head, config.n_embd // config.n_head
        self.token_table, self.position_table = body.wte.weight, body.wpe.weight
        self.blocks = [Block(block) for block in body.h]
        self.final_norm = body.ln_f
        self.head = Linear(model.lm_head.weight, None)
        self.device, self.dtype = model.device, body.wte.weight.dtype
        self.scale = 1 / math.sqrt(self.width)
        self.cache = KVCache(
            Shape(config.n_layer, self.heads, self.width, self.dtype, self.device), context_size
        )
        self.stages: dict[Sequence, Tensor] = {}
        self.prefixes = PrefixStore(prefix_bytes)
        self.reused: dict[Sequence, list[Tensor]] = {}  # found, and not yet in a stage
        self.reused_tokens = 0
        self._choose_row_counts(max_running, prefill_tokens)

    def _choose_row_counts(self, max_running: int, prefill_tokens: int) -> None:
        """Pad steps to row counts that do not change a row's bits, as measured here and now."""
        block = self.blocks[0]
        layers = [block.qkv, block.out, block.up, block.down]
        rows = self._agreeing(layers, max_running + prefill_tokens)
        heads = self._agreeing([self.head], max_running)
        self.reproducible = bool(rows and heads)
        if not self.reproducible:
            log.warning("matrix products here depend on the batch: runs may not repeat exactly")
        self.rows = RowCounts(rows or candidate_counts(max_running + prefill_tokens))
        self.head_rows = RowCounts(heads or candidate_counts(max_running))

    def _agreeing(self, layers: list[Linear], most: int) -> list[int]:
        counts = candidate_counts(most)
        for layer in layers:
            twin, sample = cancelling(layer, counts[-1])
            counts = agreeing_counts(twin, sample, counts)
            if not counts or counts[-1] < most:
                return []
        return counts

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
            self.prefixes.keep(sequence.prompt_ids, stage)
        self.reused.pop(sequence, None)
        self.cache.free(sequence, tainted=tainted)

    @torch.inference_mode()
    def forward(self, plan: Plan) -> Tensor:
        layout = self._lay_out(plan)
        x = self.token_table[layout.tokens] + self.position_table[layout.positions]
        for index, block in enumerate(self.blocks):
            attended = self._attend(block, index, block.norm_1(x), layout)
            x = block.out.plus(attended, x)
            x = block.down.plus(block.up(block.norm_2(x)), x)
        return self.head(self.final_norm(x[layout.wanted]))[: layout.sampled]

    def _settle(self, sequence: Sequence) -> None:
        """A prompt's keys and values go where decoding reads them.

        Not before it decodes: until then the step that ended the prompt may have to be run again.
        """
        stage = self.stages[sequence]
        self.cache.insert(sequence, stage[0], stage[1])
        del self.stages[sequence]
        self.prefixes.keep(sequence.prompt_ids, stage)

    def _attend(self, block: Block, layer: int, x: Tensor, layout: Layout) -> Tensor:
        """Store the new keys and values, then let each row look at its own sequence's."""
        rows, features = x.shape
        qkv = block.qkv(x).view(rows, 3, self.heads, self.width).transpose(0, 1).contiguous()
        out = torch.zeros_like(x)
        for group in layout.decode:
            mine = slice(group.at, group.at + group.count)
            out[mine] = self._decode(group, layer, qkv[:, mine]).view(group.count, features)
        for piece in layout.prefill:
            mine = slice(piece.at, piece.at + piece.chunk.stop - piece.chunk.start)
            out[mine] = self._prefill(piece, layer, qkv[:, mine])
        return out

    def _decode(self, group: DecodeGroup, layer: int, qkv: Tensor) -> Tensor:
        """``qkv`` is [3, count, heads, width]; out comes [count * heads, 1, width]."""
        length, size = group.arena.length, group.count * self.heads
        both = group.arena.both[layer]
        both.view(-1, self.width).index_copy_(0, group.slots, qkv[1:].reshape(2 * size, self.width))
        rows = slice(group.first, group.first + group.count)
        keys, values = both[:, rows].view(2, size, length, self.width)
        queries = qkv[0].reshape(size, 1, self.width)
        return self._weigh(queries, keys, values, group.mask)

    def _prefill(self, piece: PrefillPiece, layer: int, qkv: Tensor) -> Tensor:
        """``qkv`` is [3, tokens, heads, width]; out comes [tokens, heads * width]."""
        start, stop = piece.chunk.start, piece.chunk.stop
        queries, keys, values = qkv.transpose(1, 2)
        stage_keys, stage_values = piece.stage[0, layer], piece.stage[1, layer]
        stage_keys[:, start:stop] = keys
        stage_values[:, start:stop] = values
        mask = piece.mask.expand(self.heads, -1, -1)
        out = self._weigh(queries.contiguous(), stage_keys[:, :stop], stage_values[:, :stop], mask)
        return out.transpose(0, 1).reshape(stop - start, -1)

    def _weigh(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        # bmm, not scaled_dot_product_attention: that one's bits depend on the batch in float32
        # and its bfloat16 decode kernel is seven times slower here.
        scores = torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=self.scale)
        return torch.bmm(torch.softmax(scores, -1), values)

    def _lay_out(self, plan: Plan) -> Layout:
        tokens: list[int] = []
        positions: list[int] = []
        row_of: dict[Sequence, int] = {}
        decode = self._lay_out_decode(plan.decode, tokens, positions, row_of)
        prefill = []
        for chunk in plan.prefill:
            prefill.append(self._lay_out_chunk(chunk, len(tokens)))
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
            groups.append(self._group(arena, first, at, positions[at:]))
        return groups

    def _group(self, arena: Arena, first: int, at: int, positions: list[int]) -> DecodeGroup:
        count, length, heads = len(positions), arena.length, self.heads
        last = self._tensor(positions)
        seen = torch.arange(length, device=self.device) <= last[:, None]
        mask = torch.zeros(count, length, dtype=self.dtype, device=self.device)
        mask = mask.masked_fill_(~seen, -math.inf)[:, None].expand(count, heads, length)
        rows = torch.arange(first, first + count, device=self.device)[:, None] * heads
        keys = ((rows + torch.arange(heads, device=self.device)) * length + last[:, None]).view(-1)
        slots = torch.cat([keys, keys + arena.both[0, 0].numel() // self.width])
        return DecodeGroup(arena, first, count, at, mask.reshape(count * heads, 1, length), slots)

    def _lay_out_chunk(self, chunk: Chunk, at: int) -> PrefillPiece:
        prompt = len(chunk.sequence.prompt_ids)
        stage = self.stages.get(chunk.sequence)
        if stage is None:
            size = (2, len(self.blocks), self.heads, prompt, self.width)
            stage = torch.empty(size, dtype=self.dtype, device=self.device)
            for index, found in enumerate(self.reused.pop(chunk.sequence, ())):
                stage[..., index * CHUNK : (index + 1) * CHUNK, :] = found
                self.reused_tokens += CHUNK
            self.stages[chunk.sequence] = stage
        mask = torch.full((chunk.stop - chunk.start, chunk.stop), -math.inf, dtype=self.dtype)
        return PrefillPiece(chunk, at, stage, mask.triu_(chunk.start + 1).to(self.device))

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)


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
