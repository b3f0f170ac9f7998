"""A matrix product whose rows do not depend on one another, bit for bit, and are fast.

Where oneDNN can, weights are packed once into the layout that its kernels want (2 to 5 times
faster than ``F.linear`` on this project's shapes); elsewhere it is ``F.linear``. Either kernel may
sum in another order, and so round otherwise, for another number of rows. ``counts_that_agree``
measures which numbers give every row the same bits: with those alone a ``Linear`` is called, and
``RowCounts`` pads a step to them.
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
    More than ``most`` rows are several calls of the kernel, all but the last with ``most``.
    """

    most: int | None = None

    def __init__(self, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> None:
        self.out_features, self.in_features = weight.shape
        self.packed = can_pack(weight.device, weight.dtype)
        self.weight = pack(weight) if self.packed else weight.contiguous()
        self.bias = bias
        self.gelu = gelu

    def __call__(self, x: Tensor) -> Tensor:
        if self.most is None or len(x) <= self.most:
            return self._call(x)
        return torch.cat([self._call(rows) for rows in torch.split(x, self.most)])

    def _call(self, x: Tensor) -> Tensor:
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
    """The row counts of steps; a step of other size is padded up to the next."""

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


def counts_of_calls(calls: list[int], most: int) -> list[int]:
    """The row counts up to one that holds ``most`` that come to one of ``calls``, or to some times
    the largest and one of them (see ``Linear.most``)."""
    return [full + call for full in range(0, most, calls[-1]) for call in calls]


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
    product: Callable[[Tensor], Tensor], sample: Tensor, counts: Iterable[int]
) -> list[int]:
    """Those of ``counts`` for which each row of ``product`` has the bits that it has in
    ``sample``, at any place."""
    reference = product(sample)

    def agrees(count: int) -> bool:
        places = torch.arange(count, device=sample.device)
        turns = (places % len(sample), (places + len(sample) // 2) % len(sample))
        return all(torch.equal(product(sample[turn]), reference[turn]) for turn in turns)

    return [count for count in counts if agrees(count)]


def counts_that_agree(trials: Iterable[Trial], usual: int, counts: Iterable[int]) -> list[int]:
    """Those of ``counts`` at which every trial gives each row the bits it has among ``usual``."""
    for trial in trials:
        product, sample = trial(usual)
        counts = agreeing_counts(product, sample, counts)
    return [*counts]
