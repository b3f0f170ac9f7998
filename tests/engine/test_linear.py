import pytest
import torch
import torch.nn.functional as F

from engine.linear import (
    Linear,
    RowCounts,
    agreeing_counts,
    cancelling,
    candidate_counts,
    counts_of_calls,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 7, 33])
def test_the_packed_product_is_the_plain_one(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, 96), torch.randn(160, 96) / 10, torch.randn(160)
    residual = torch.randn(rows, 160)
    x, weight, bias, residual = (t.to(dtype) for t in (x, weight, bias, residual))
    plain = F.linear(x.float(), weight.float(), bias.float())
    atol, rtol = (1e-5, 1e-5) if dtype is torch.float32 else (0.05, 0.02)
    torch.testing.assert_close(Linear(weight, bias)(x).float(), plain, atol=atol, rtol=rtol)
    gelu = F.gelu(plain, approximate="tanh")
    torch.testing.assert_close(
        Linear(weight, bias, gelu=True)(x).float(), gelu, atol=atol, rtol=rtol
    )
    added = Linear(weight, bias).plus(x, residual).float()
    torch.testing.assert_close(added, plain + residual.float(), atol=atol, rtol=rtol)


def test_without_onednn_it_is_the_same_function(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 96), torch.randn(160, 96) / 10, torch.randn(160)
    packed = Linear(weight, bias, gelu=True)
    monkeypatch.setattr("engine.linear.can_pack", lambda *_: False)
    plain = Linear(weight, bias, gelu=True)
    assert not plain.packed
    torch.testing.assert_close(plain(x), packed(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plain.plus(x, x @ weight.T), packed.plus(x, x @ weight.T))


def test_candidate_counts_reach_the_largest_step() -> None:
    for most in (1, 4, 5, 64, 320, 1000):
        counts = candidate_counts(most)
        assert counts == sorted(set(counts))
        assert counts[-1] >= most
        assert all(RowCounts(counts).pad(rows) >= rows for rows in range(1, most + 1))


def test_steps_are_made_of_calls_that_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    called = set()

    def product(x: torch.Tensor, *_: object) -> torch.Tensor:
        called.add(len(x))
        return 2 * x

    monkeypatch.setattr("engine.linear.packed_linear", product)
    calls, most = [40, 44, 160], 321
    layer = Linear(torch.eye(3), None)
    layer.packed, layer.most = True, calls[-1]
    called.clear()
    counts = counts_of_calls(calls, most)
    assert counts[0] == 40
    assert counts[-1] >= most
    for count in counts:
        x = torch.randn(count, 3)
        assert torch.equal(layer(x), 2 * x)
    assert called == set(calls)


def test_counts_whose_rows_come_out_otherwise_are_not_used() -> None:
    def product(x: torch.Tensor) -> torch.Tensor:
        return x * (1 + 1e-6 * (x.shape[0] in {1, 3, 9}))

    sample = torch.randn(4, 4)
    assert agreeing_counts(product, sample, [1, 2, 3, 4, 8, 9, 10]) == [2, 4, 8, 10]


def test_products_that_depend_on_a_rows_place_are_not_used() -> None:
    def product(x: torch.Tensor) -> torch.Tensor:
        return x + 1e-6 * torch.arange(len(x))[:, None]

    assert agreeing_counts(product, torch.zeros(4, 4), [2, 4, 8]) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cancelling_product_shows_in_which_order_it_was_summed(dtype: torch.dtype) -> None:
    layer = Linear(torch.zeros(50, 301, dtype=dtype), None)
    twin, sample = cancelling(layer, 3)
    assert (twin.in_features, twin.out_features) == (301, 50)
    whole = twin(sample)
    assert whole.abs().max() < 1e-3
    assert (whole != 0).any()
    turned = Linear(twin.weight.to_dense().flip(1), None)(sample.flip(1))
    assert not torch.equal(whole, turned)
