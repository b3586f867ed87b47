import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssmc.errors import NumericsError, UsageError
from ssmc.quant.observers import Absmax, Observer, Percentile

PERCENTILES = [0.0, 0.5, 0.99, 0.999, 0.99999, 1.0]


def quantile(x: Tensor, p: float, dim: int | None = None) -> Tensor:
    return torch.quantile(x.abs().double(), p, dim=dim).float()


def observed(observer: Observer, *batches: Tensor) -> Observer:
    for batch in batches:
        observer.observe(batch)
    return observer


def assert_same(first: Observer, second: Observer) -> None:
    assert first.tokens == second.tokens
    assert torch.equal(first.channel(), second.channel())
    assert torch.equal(first.tensor(), second.tensor())


def test_absmax() -> None:
    x = torch.randn(3, 101, 7) ** 3
    observer = observed(Absmax(), x[:1], x[1:])
    assert torch.equal(observer.channel(), x.abs().amax((0, 1)))
    assert torch.equal(observer.tensor(), x.abs().amax())


@pytest.mark.parametrize("p", PERCENTILES)
@pytest.mark.parametrize("tokens", [1, 2, 1000])
def test_percentile_is_the_exact_quantile(tokens: int, p: float) -> None:
    x = torch.randn(tokens, 7) ** 3
    observer = observed(Percentile(p, tokens), *x.split(137))
    assert torch.equal(observer.channel(), quantile(x, p, dim=0))
    assert torch.equal(observer.tensor(), quantile(x.flatten(), p))


@pytest.mark.parametrize("p", PERCENTILES)
def test_fewer_tokens_than_announced_are_exact_too(p: float) -> None:
    x = torch.randn(333, 5)
    observer = observed(Percentile(p, 5000), x)
    assert torch.equal(observer.channel(), quantile(x, p, dim=0))
    assert torch.equal(observer.tensor(), quantile(x.flatten(), p))


@settings(max_examples=50, deadline=None)
@given(
    st.floats(0, 1),
    st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any),
    st.integers(0, 6),
)
def test_neither_batching_nor_merging_matters(p: float, sizes: list[int], cut: int) -> None:
    batches = [torch.randn(size, 3) for size in sizes]
    whole = torch.cat(batches)
    for make in (Absmax, lambda: Percentile(p, len(whole))):
        first, second = observed(make(), *batches[:cut]), observed(make(), *batches[cut:])
        first.merge(second)
        assert_same(first, observed(make(), whole[None]))


def test_memory_is_bounded_by_the_tail() -> None:
    observer = Percentile(0.999, 20_000)
    observed(observer, *torch.randn(20_000, 4).split(1000))
    held = [value for value in vars(observer).values() if isinstance(value, Tensor)]
    assert sum(value.numel() for value in held) < 200


def test_observing_does_not_keep_or_change_the_activation() -> None:
    x = torch.randn(5, 3)
    before = x.clone()
    observer = observed(Absmax(), x)
    x.mul_(10)
    assert torch.equal(observer.channel(), before.abs().amax(0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_bad_numbers_are_refused(bad: float) -> None:
    x = torch.randn(2, 5, 3)
    for observer in (Absmax(), Percentile(0.9, 30)):
        observer.observe(x)
        observer.check()
        worse = x.clone()
        worse[1, 2, 1] = bad
        observer.observe(worse)
        observer.observe(x)
        with pytest.raises(NumericsError, match="what was observed holds NaN or infinity"):
            observer.check()


def test_misuse() -> None:
    with pytest.raises(UsageError, match="no tokens"):
        Absmax().channel()
    with pytest.raises(UsageError, match="no tokens"):
        Percentile(0.9, 10).tensor()
    with pytest.raises(UsageError, match="p=99"):
        Percentile(99, 10)
    with pytest.raises(UsageError, match="11 tokens, 10 were announced"):
        observed(Percentile(0.9, 10), torch.ones(6, 2), torch.ones(5, 2))
