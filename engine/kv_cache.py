"""Keys and values of running sequences, written in place. Knows no model, no scheduling.

Sequences lie in arenas by length: one arena holds those of up to 32 tokens, the next those of up
to 64, then 96, 128, 192, 256 and so on. Attention, whose time is that of reading the cache, pads
each to its own arena's length, which follows from its own length alone. A step needs no gather: an
arena's rows are dense, its tensors are sliced. A sequence that outgrows its arena moves to the
next; one that leaves is replaced by the last row. Arenas grow by doubling, and one that is empty
gives its memory back when another grows, so that it follows use, not the worst case.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.sequence import Sequence

SHORTEST = 32


@dataclass(frozen=True, slots=True)
class Shape:
    """What a token's keys and values take: two vectors of ``width`` a head and layer."""

    layers: int
    heads: int
    width: int
    dtype: torch.dtype
    device: torch.device


class Arena:
    """Rows of ``length`` tokens each: ``keys`` and ``values`` are [layers, rows, heads, length,
    width], and row i belongs to ``sequences[i]``."""

    def __init__(self, shape: Shape, length: int) -> None:
        self.shape = shape
        self.length = length
        self.sequences: list[Sequence] = []
        self._allocate(0)

    def _allocate(self, rows: int) -> None:
        size = (self.shape.layers, 2, rows, self.shape.heads, self.length, self.shape.width)
        # Zeros: attention multiplies what lies behind a sequence by 0, and 0 x NaN is NaN.
        self.both = torch.zeros(size, dtype=self.shape.dtype, device=self.shape.device)
        self.keys, self.values = self.both[:, 0], self.both[:, 1]

    @property
    def is_full(self) -> bool:
        return len(self.sequences) == self.both.shape[2]

    def add(self, sequence: Sequence) -> int:
        """A row for it, with whatever an earlier sequence left there."""
        if self.is_full:
            old, rows = self.both, len(self.sequences)
            self._allocate(max(1, 2 * rows))
            self.both[:, :, :rows] = old
        self.sequences.append(sequence)
        return len(self.sequences) - 1

    def remove(self, row: int, *, tainted: bool = False) -> Sequence | None:
        """Free a row. The last one moves into it: its sequence comes back if there is one."""
        if tainted:
            self.both[:, :, row] = 0
        last = len(self.sequences) - 1
        moved = self.sequences.pop()
        if row == last:
            return None
        self.both[:, :, row] = self.both[:, :, last]
        if tainted:
            self.both[:, :, last] = 0
        self.sequences[row] = moved
        return moved

    def give_back(self) -> None:
        """Its memory, if nobody is in it, but for one row."""
        if not self.sequences and self.both.shape[2] > 1:
            self._allocate(1)


def arena_lengths(context_size: int) -> list[int]:
    """Powers of two and, from 96, what lies half way: at most a third is read in vain."""
    lengths = []
    power = SHORTEST
    while power < context_size:
        lengths += [power, power + power // 2] if power > SHORTEST else [power]
        power *= 2
    return [length for length in lengths if length < context_size] + [context_size]


class KVCache:
    """Where each sequence's keys and values lie."""

    def __init__(self, shape: Shape, context_size: int) -> None:
        self.shape = shape
        self.arenas = [Arena(shape, length) for length in arena_lengths(context_size)]
        self.places: dict[Sequence, tuple[Arena, int]] = {}

    def arena_for(self, tokens: int) -> Arena:
        return next(arena for arena in self.arenas if arena.length >= tokens)

    def insert(self, sequence: Sequence, keys: Tensor, values: Tensor) -> None:
        """Store its first tokens: both are [layers, heads, tokens, width]."""
        tokens = keys.shape[2]
        arena = self.arena_for(tokens + 1)
        row = self._row_in(arena, sequence)
        self.places[sequence] = (arena, row)
        arena.keys[:, row, :, :tokens] = keys
        arena.values[:, row, :, :tokens] = values

    def reserve(self, sequence: Sequence, tokens: int) -> tuple[Arena, int]:
        """Its place, after a move if it has to hold more tokens than its arena's length."""
        arena, row = self.places[sequence]
        if tokens <= arena.length:
            return arena, row
        target = self.arena_for(tokens)
        new = self._row_in(target, sequence)
        target.both[:, :, new, :, : arena.length] = arena.both[:, :, row]
        self.free(sequence)
        self.places[sequence] = (target, new)
        return target, new

    def _row_in(self, arena: Arena, sequence: Sequence) -> int:
        """A row of an arena. Before that grows, others give back what nobody needs: where as many
        come as have left, nothing is allocated."""
        if arena.is_full:
            for other in self.arenas:
                other.give_back()
        return arena.add(sequence)

    def free(self, sequence: Sequence, *, tainted: bool = False) -> None:
        """Give up its place, if it has one; ``tainted`` wipes what could spread (NaN)."""
        place = self.places.pop(sequence, None)
        if place is None:
            return
        arena, row = place
        moved = arena.remove(row, tainted=tainted)
        if moved is not None:
            self.places[moved] = (arena, row)

    @property
    def used(self) -> int:
        return len(self.places)
