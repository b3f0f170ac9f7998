"""Chooses the next token of each row from its logits. Knows no model and no text.

Random numbers are counted, not drawn from a shared stream: the number for a token is a hash of
its request's seed and the token's place in the output. So a request's choices depend on nothing
but itself, and any of them can be made again alone.

Filters mean what Transformers' logits processors mean (penalty, temperature, top-k, top-p; ties
with the k-th largest logit stay in). Candidates are ordered by logit, then by token id, and chosen
by inverting their cumulative distribution in float64.
"""

from collections.abc import Sequence as Rows
from hashlib import blake2b

import torch
from torch import Tensor

from engine.sampling import SamplingParams
from engine.sequence import Sequence

# How many of the largest logits are looked at: few requests want more than the first number. But
# logits far from 0 are many times equal in bfloat16 (half apart from 64 on), and with the k-th
# largest its equals stay in: the second number holds most of those.
NARROW, WIDER = 64, 256


def uniform(seed: int, place: int) -> float:
    """A number in [0, 1) for the ``place``-th token of a request with this seed."""
    digest = blake2b(f"{seed}:{place}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


def sample(logits: Tensor, sequences: Rows[Sequence]) -> list[int | None]:
    """The next token of each sequence, given ``logits`` [sequences, vocabulary].

    None stands for a row that holds NaN or has no finite maximum. Rows do not touch one another.
    """
    return sample_largest(NARROW, penalised(logits, sequences), sequences) if sequences else []


def sample_largest(count: int, logits: Tensor, sequences: Rows[Sequence]) -> list[int | None]:
    """The same from the ``count`` largest logits, where a row's filters keep no more than those."""
    count = min(count, logits.shape[1])
    values, ids = logits.topk(count, dim=1)
    values, ids = in_order(values.double(), ids)
    tops, least = values[:, 0].tolist(), values[:, -1].tolist()
    kth = kth_values(values, sequences)
    tokens: list[int | None] = choose(values, ids, sequences).tolist()
    short = []
    for row, sequence in enumerate(sequences):
        if not abs(tops[row]) < float("inf"):
            tokens[row] = None
        elif count < logits.shape[1] and not enough(
            sequence.params, kth[row], tops[row], least[row]
        ):
            short.append(row)
    if short and count < WIDER:
        others = sample_largest(WIDER, logits[short], [sequences[row] for row in short])
    else:
        others = [choose_wide(logits[row], sequences[row]) for row in short]
    for row, token in zip(short, others, strict=True):
        tokens[row] = token
    return tokens


def penalised(logits: Tensor, sequences: Rows[Sequence]) -> Tensor:
    """Keskar et al. 2019, over prompt and output: positive logits divided, others multiplied."""
    rows = [i for i, s in enumerate(sequences) if s.params.repetition_penalty != 1.0]
    if not rows:
        return logits
    logits = logits.float().clone()
    for row in rows:
        sequence = sequences[row]
        penalty = sequence.params.repetition_penalty
        seen = torch.tensor([*{*sequence.prompt_ids, *sequence.output_ids}], device=logits.device)
        scores = logits[row, seen]
        logits[row, seen] = torch.where(scores < 0, scores * penalty, scores / penalty)
    return logits


def in_order(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Equal values by ascending id: ``topk`` leaves their order open."""
    if not bool((values[:, 1:] == values[:, :-1]).any()):
        return values, ids
    ids, order = ids.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, order)


def kth_values(values: Tensor, sequences: Rows[Sequence]) -> list[float]:
    """The smallest logit that top-k keeps, of each row; -inf where that is not among these."""
    last = values.shape[1]
    ks = [s.params.top_k for s in sequences]
    places = torch.tensor([min(max(k, 1), last) - 1 for k in ks], device=values.device)
    kth: list[float] = values.gather(1, places[:, None])[:, 0].tolist()
    return [v if 0 < k <= last else -float("inf") for v, k in zip(kth, ks, strict=True)]


def enough(params: SamplingParams, kth: float, top: float, least: float) -> bool:
    """Whether the narrow candidates hold all that the filters keep: top-k may keep more, and so
    may ties with the smallest one that it keeps."""
    if params.temperature == 0:
        return top > least
    return kth > least


def choose(values: Tensor, ids: Tensor, sequences: Rows[Sequence]) -> Tensor:
    """A token id a row, from candidates in order: ``values`` float64 and ``ids``, [rows, n]."""
    device, n = values.device, values.shape[1]
    greedy = [s.params.temperature == 0 for s in sequences]
    temperatures = [s.params.temperature or 1.0 for s in sequences]
    top_ps = [s.params.top_p for s in sequences]
    ks = [1 if g else min(s.params.top_k or n, n) for s, g in zip(sequences, greedy, strict=True)]
    draws = [uniform(s.params.seed, len(s.output_ids)) for s in sequences]
    table = torch.tensor([temperatures, top_ps, draws], dtype=torch.float64, device=device)
    temperature, top_p, draw = table[:, :, None]
    kth = values.gather(1, torch.tensor(ks, device=device)[:, None] - 1)
    weights = ((values - values[:, :1]) / temperature).exp()
    weights = weights.masked_fill(values < kth, 0.0)
    sums = weights.cumsum(1)
    before = sums - weights
    kept = (before < top_p * sums[:, -1:]) & (weights > 0)
    kept[:, 0] = True
    total = torch.where(kept, sums, 0.0).amax(1, keepdim=True)
    last = kept.sum(1, keepdim=True) - 1
    picked = torch.minimum((sums <= draw * total).sum(1, keepdim=True), last)
    if any(greedy):
        picked = picked.masked_fill(torch.tensor(greedy, device=device)[:, None], 0)
    return ids.gather(1, picked)[:, 0]


def choose_wide(logits: Tensor, sequence: Sequence) -> int:
    """The same over the whole vocabulary."""
    values, ids = logits[None].sort(dim=1, descending=True, stable=True)
    return int(choose(values.double(), ids, [sequence]))
