"""A matrix product whose rows do not depend on one another, bit for bit, and are fast.

Where oneDNN can, weights are packed once into the layout that its kernels want (2 to 5 times
faster than ``F.linear`` on this project's shapes); elsewhere it is ``F.linear``. Either kernel may
round differently for some row counts. ``RowCounts`` names the counts that a step is padded to, and
``agreeing_counts`` measures which of them give every row the same bits.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

# Of a number of rows: something that is computed row by row, and a sample of that many for it.
Trial = Callable[[int], tuple[Callable[[Tensor], Tensor], Tensor]]


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch offers oneDNN's packed linear for this device and dtype (operators are
    private to torch: try them once, on a small product, rather than trust a version)."""
    if device.type != "cpu":
        return False
    try:
        weight, x = torch.ones(32, 32, dtype=dtype), torch.ones(2, 32, dtype=dtype)
        out = packed_linear(x, pack(weight), None, "none")
        return bool((out == 32).all())
    except (RuntimeError, AttributeError):
        return False


def pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())  # type: ignore[no-any-return]


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, then: str) -> Tensor:
    algorithm = "tanh" if then == "gelu" else ""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], algorithm)  # type: ignore[no-any-return]


class Linear:
    """``x @ weight.T + bias``, then GELU (tanh form) or an added residual where asked.

    ``weight`` is [out, in]. ``x`` is [rows, in] and contiguous; rows come back as [rows, out].
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> None:
        self.out_features, self.in_features = weight.shape
        self.packed = can_pack(weight.device, weight.dtype)
        self.weight = pack(weight) if self.packed else weight.contiguous()
        self.bias = bias
        self.gelu = gelu

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed:
            return packed_linear(x, self.weight, self.bias, "gelu" if self.gelu else "none")
        y = F.linear(x, self.weight, self.bias)
        return F.gelu(y, approximate="tanh") if self.gelu else y

    def on_any_shape(self, x: Tensor) -> Tensor:
        """The product of [..., in] as [..., out]."""
        return self(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """The product added to ``residual``, which is left as it was."""
        # oneDNN's fused addition takes twice the time of the product here.
        return self(x).add_(residual)


class RowCounts:
    """The row counts that kernels are called with; a step of other size is padded up."""

    def __init__(self, counts: Iterable[int]) -> None:
        self.counts = sorted(counts)

    def pad(self, rows: int) -> int:
        return self.counts[bisect_left(self.counts, rows)]


def candidate_counts(most: int) -> list[int]:
    """Every count to 16, then ever wider steps of an eighth or less; the last holds ``most``."""
    counts = [1]
    while counts[-1] < most:
        counts.append(counts[-1] + (1 << max(0, counts[-1].bit_length() - 4)))
    return counts


def cancelling(layer: Linear, rows: int) -> tuple[Linear, Tensor]:
    """A layer of the same shape and kind, and inputs for it, whose products are nothing but the
    rounding errors of their sums: every term has its opposite somewhere.

    On ordinary numbers bfloat16 rounds off nearly every difference between two orders of summing:
    a test of a few thousand products sees none, and one text in ten then comes out otherwise.
    """
    generator = torch.Generator().manual_seed(0)
    half, rest = divmod(layer.in_features, 2)
    order = torch.randperm(layer.in_features, generator=generator)

    def scattered(left: Tensor, right: Tensor) -> Tensor:
        return torch.cat([left, right, left.new_zeros(len(left), rest)], dim=1)[:, order]

    weight = torch.randn(layer.out_features, half, generator=generator)
    sample = torch.randn(rows, half, generator=generator)
    device, dtype = layer.weight.device, layer.weight.dtype
    bias = None if layer.bias is None else torch.zeros_like(layer.bias)
    twin = Linear(scattered(weight, -weight).to(device, dtype), bias, gelu=layer.gelu)
    return twin, scattered(sample, sample).to(device, dtype)


def agreeing_counts(
    product: Callable[[Tensor], Tensor], sample: Tensor, counts: list[int]
) -> list[int]:
    """Those of ``counts`` for which each row of ``product`` has the bits it has in the largest.

    ``sample`` is [largest count, in]. Rows are also tried at other places in the batch.
    """
    reference = product(sample)

    def agrees(count: int) -> bool:
        ends = (sample[:count], reference[:count]), (sample[-count:], reference[-count:])
        return all(torch.equal(product(x.contiguous()), expected) for x, expected in ends)

    return [count for count in counts if agrees(count)]


def counts_that_agree(trials: Iterable[Trial], most: int) -> list[int]:
    """Row counts at which every trial gives each row the same bits, the last of which holds
    ``most``; none where there are no such."""
    counts = candidate_counts(most)
    for trial in trials:
        product, sample = trial(counts[-1])
        counts = agreeing_counts(product, sample, counts)
        if not counts or counts[-1] < most:
            return []
    return counts
