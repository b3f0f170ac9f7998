"""Keys and values of prompts that were computed before, for prompts that begin alike.

A conversation's next prompt begins with its last one, so all but the newest turn is copied, not
computed. What is kept is whole chunks of the scheduler's grid, each under a hash of all tokens up
to its end: a chunk's numbers are a function of those tokens alone, bit for bit
(docs/decisions/0002-reproducible-batches.md), so a text does not depend on what was found here.
What decoding wrote is not kept, because a chunk would have other last bits. Knows no model.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from engine.scheduler import CHUNK


class PrefixStore:
    """At most ``budget`` bytes; what was used longest ago goes first, and of one prompt its end:
    nothing finds a chunk whose beginning is gone."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.bytes = 0
        self.chunks: OrderedDict[bytes, Tensor] = OrderedDict()

    def find(self, prompt_ids: Sequence[int]) -> list[Tensor]:
        """The chunks, [2, layers, heads, CHUNK, width] each, that the prompt begins with.

        One token at least is left to compute: its logits choose the first new one.
        """
        found = []
        for key, stop in keys(prompt_ids):
            if stop == len(prompt_ids) or key not in self.chunks:
                break
            found.append(key)
        self._touch(found)
        return [self.chunks[key] for key in found]

    def keep(self, prompt_ids: Sequence[int], computed: Tensor) -> None:
        """Take the whole chunks of a prompt's [2, layers, heads, tokens, width], from the first on
        as far as the budget goes."""
        kept: list[bytes] = []
        for key, stop in keys(prompt_ids):
            chunk = computed[..., stop - CHUNK : stop, :]
            if size_of(chunk) * (len(kept) + 1) > self.budget:
                break
            if key not in self.chunks and not self._add(key, chunk):
                break
            kept.append(key)
            self.chunks.move_to_end(key)  # or what is added next could push it out
            self._evict()
        self._touch(kept)

    def _add(self, key: bytes, chunk: Tensor) -> bool:
        if not bool(torch.isfinite(chunk).all()):
            return False
        self.chunks[key] = chunk.clone()
        self.bytes += size_of(chunk)
        return True

    def _touch(self, prompt: list[bytes]) -> None:
        for key in reversed(prompt):
            self.chunks.move_to_end(key)

    def _evict(self) -> None:
        while self.bytes > self.budget:
            _, oldest = self.chunks.popitem(last=False)
            self.bytes -= size_of(oldest)


def size_of(chunk: Tensor) -> int:
    return chunk.numel() * chunk.element_size()


def keys(prompt_ids: Sequence[int]) -> Iterator[tuple[bytes, int]]:
    """For each whole chunk, a hash of all tokens up to its end, and that end."""
    digest = hashlib.blake2b(digest_size=16)
    for stop in range(CHUNK, len(prompt_ids) + 1, CHUNK):
        digest.update(array("q", prompt_ids[stop - CHUNK : stop]).tobytes())
        yield digest.digest(), stop
