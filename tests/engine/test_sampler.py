"""The sampler against Transformers' own logits processors."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.sampler import NARROW, WIDER, choose_wide, sample, uniform
from engine.sampling import SamplingParams
from engine.sequence import Sequence

DRAWS = 4000
PROMPT = (3, 5, 5, 8)


def processed(logits: Tensor, params: SamplingParams) -> Any:
    steps = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(params.repetition_penalty)])
    steps.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(TopPLogitsWarper(params.top_p))
    return steps(torch.tensor([PROMPT]), logits[None].float())[0].softmax(-1)


def drawn(logits: Tensor, seed_offset: int, **params: float) -> list[int]:
    rows = [
        Sequence(PROMPT, SamplingParams(9, seed=seed_offset + seed, **params))  # type: ignore[arg-type]
        for seed in range(DRAWS)
    ]
    tokens = sample(logits.expand(DRAWS, -1), rows)
    assert None not in tokens
    return [token for token in tokens if token is not None]


def chi_square_p(tokens: list[int], expected: Tensor) -> float:
    """Wilson and Hilferty's normal approximation of the upper tail; rare tokens share a bin."""
    counts = Counter(tokens)
    assert all(expected[token] > 0 for token in counts)
    bins: list[tuple[float, float]] = []
    rest = [0.0, 0.0]
    for token, p in enumerate(expected.tolist()):
        if p * DRAWS >= 5:
            bins.append((counts[token], p * DRAWS))
        else:
            rest[0] += counts[token]
            rest[1] += p * DRAWS
    if rest[1] >= 1:
        bins.append((rest[0], rest[1]))
    k = len(bins) - 1
    statistic = sum((seen - due) ** 2 / due for seen, due in bins)
    z = ((statistic / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))
    return 0.5 * math.erfc(z / math.sqrt(2))


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 0},
        {"top_k": 50, "temperature": 0.7},
        {"top_k": 5, "temperature": 1.5},
        {"top_k": 100},
        {"top_k": 0, "top_p": 0.8},
        {"top_k": 40, "top_p": 0.5, "temperature": 1.2},
        {"top_k": 20, "repetition_penalty": 1.8},
        {"top_k": 0, "top_p": 0.95, "repetition_penalty": 0.7, "temperature": 0.9},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frequencies_are_those_of_transformers(
    params: dict[str, float], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(7)
    logits = (torch.randn(400, generator=generator) * 2).to(dtype)
    full = SamplingParams(9, seed=0, **params)  # type: ignore[arg-type]
    tokens = drawn(logits, 10_000, **params)
    assert chi_square_p(tokens, processed(logits, full)) > 0.01


def test_the_chi_square_test_would_see_a_wrong_temperature() -> None:
    logits = torch.randn(400, generator=torch.Generator().manual_seed(7)) * 2
    wrong = SamplingParams(9, seed=0, top_k=50, temperature=0.8)
    assert chi_square_p(drawn(logits, 0, top_k=50), processed(logits, wrong)) < 1e-6


def test_ties_with_the_kth_stay_in_also_beyond_the_narrow_candidates() -> None:
    logits = torch.zeros(500)
    logits[123] = 1.0
    tokens = drawn(logits, 0, top_k=10)
    assert len(set(tokens)) > 400


def test_equals_of_the_kth_are_found_wherever_they_end() -> None:
    generator = torch.Generator().manual_seed(5)
    logits = (torch.randn(30, 50_257, generator=generator) * 2.5 - 90).bfloat16()  # half apart
    ks = (10, 50, 200)
    rows = [Sequence(PROMPT, SamplingParams(9, seed=i, top_k=ks[i % 3])) for i in range(30)]
    kth = [logits[i].topk(row.params.top_k).values[-1] for i, row in enumerate(rows)]
    kept = [int((logits[i] >= kth[i]).sum()) for i in range(30)]
    assert min(kept) < NARROW < sorted(kept)[15] < WIDER < max(kept)
    assert sample(logits, rows) == [choose_wide(logits[i], row) for i, row in enumerate(rows)]


def test_greedy_takes_the_largest_and_of_equals_the_first() -> None:
    logits = torch.zeros(3, 500)
    logits[0, [400, 17]] = 2.0
    logits[1, 499] = 0.5
    greedy = [Sequence((1,), SamplingParams(9, seed=s, temperature=0.0)) for s in range(3)]
    assert sample(logits, greedy) == [17, 499, 0]


def test_greedy_heeds_the_repetition_penalty() -> None:
    logits = torch.tensor([[3.0, 2.9, 0.0, -1.0]])
    params = SamplingParams(9, seed=0, temperature=0.0, repetition_penalty=1.2)
    assert sample(logits, [Sequence((0,), params)]) == [1]


def test_a_row_chooses_the_same_alone_and_among_others() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(48, 3000, generator=generator) * 3).bfloat16()
    kinds = [
        {"temperature": 0.0},
        {"top_k": 50},
        {"top_k": 0},
        {"top_k": 0, "top_p": 0.9},
        {"top_k": 7, "repetition_penalty": 1.3},
        {"top_k": 200, "temperature": 3.0},
    ]
    rows = [
        Sequence((1, 2, 3), SamplingParams(9, seed=i, **kinds[i % len(kinds)]))  # type: ignore[arg-type]
        for i in range(48)
    ]
    alone = [sample(logits[i : i + 1], [rows[i]])[0] for i in range(48)]
    assert sample(logits, rows) == alone
    assert sample(logits.flip(0), rows[::-1]) == alone[::-1]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_none_and_the_others_are_not(poison: float) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 300, generator=generator)
    rows = [Sequence((1,), SamplingParams(9, seed=i, top_k=i * 25)) for i in range(3)]
    clean = sample(logits, rows)
    logits[1, :] = poison
    assert sample(logits, rows) == [clean[0], None, clean[2]]


def test_one_nan_among_numbers_is_enough() -> None:
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(3))
    logits[0, 200] = math.nan
    assert sample(logits, [Sequence((1,), SamplingParams(9, seed=0))]) == [None]


def test_each_token_of_a_request_has_its_own_number() -> None:
    params = SamplingParams(99, seed=1, top_k=0)
    rows = [Sequence((1,), params, output_ids=[2] * place) for place in range(50)]
    assert len(set(sample(torch.zeros(50, 4000), rows))) > 40


def test_uniform_numbers_are_uniform_and_independent_of_their_neighbours() -> None:
    numbers = torch.tensor([[uniform(seed, place) for place in range(50)] for seed in range(200)])
    assert 0.0 <= numbers.min() <= numbers.max() < 1.0
    assert abs(float(numbers.mean()) - 0.5) < 0.01
    assert abs(float(torch.corrcoef(numbers[:, :2].T)[0, 1])) < 0.2
    assert abs(float(torch.corrcoef(numbers[:2])[0, 1])) < 0.4
