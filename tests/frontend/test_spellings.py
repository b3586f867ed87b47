"""Every spelling of an operation is recorded as the dialect's, and computes the same."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmc.core import dialect
from ssmc.core.graph import Graph
from ssmc.errors import UnsupportedError
from ssmc.frontend import trace

from .models import error

Y = torch.rand(6) + 0.5
W = torch.randn(4, 6)

# name: (function of x [B, L, 6], positive; the operators it is recorded as)
SPELLINGS: dict[str, tuple[Callable[[Tensor], Any], list[str]]] = {
    "x.add(y)": (lambda x: x.add(Y), ["add"]),
    "torch.add": (lambda x: torch.add(x, Y), ["add"]),
    "iadd": (lambda x: operator.iadd(x * 1, Y), ["mul", "add"]),
    "y + x": (lambda x: Y + x, ["add"]),
    "1 - x": (lambda x: 1 - x, ["sub"]),
    "rsub": (lambda x: torch.rsub(x, Y), ["sub"]),
    "x.sub": (lambda x: x.sub(Y), ["sub"]),
    "torch.mul": (lambda x: torch.mul(x, 2), ["mul"]),
    "torch.div": (lambda x: torch.div(x, Y), ["truediv"]),
    "reciprocal": (lambda x: x.reciprocal(), ["truediv"]),
    "square": (lambda x: x.square(), ["pow"]),
    "x ** 2": (lambda x: x**2, ["pow"]),
    "matmul": (lambda x: x.matmul(W.T), ["matmul"]),
    "x @ w": (lambda x: x @ W.T, ["matmul"]),
    "abs": (lambda x: abs(x), ["abs"]),
    "exp": (lambda x: x.exp(), ["exp"]),
    "negative": (lambda x: torch.negative(x), ["neg"]),
    "rsqrt": (lambda x: x.rsqrt(), ["rsqrt"]),
    "F.sigmoid": (lambda x: F.sigmoid(x), ["sigmoid"]),
    "x.tanh": (lambda x: x.tanh(), ["tanh"]),
    "nn.SiLU": (nn.SiLU(), ["silu"]),
    "nn.GELU": (nn.GELU(), ["gelu"]),
    "gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), ["gelu"]),
    "x.relu": (lambda x: x.relu(), ["relu"]),
    "nn.Softplus": (nn.Softplus(), ["softplus"]),
    "x.softmax": (lambda x: x.softmax(-1), ["softmax"]),
    "nn.Softmax": (nn.Softmax(dim=-1), ["softmax"]),
    "x.clamp": (lambda x: x.clamp(max=1.0), ["clamp"]),
    "x.mean": (lambda x: x.mean(dim=-1, keepdim=True), ["mean"]),
    "x.sum": (lambda x: x.sum(-1), ["sum"]),
    "view": (lambda x: x.view(x.shape[0], x.size(1), 2, 3), ["size", "size", "reshape"]),
    "reshape of a tuple": (lambda x: x.reshape((-1, 6)), ["reshape"]),
    "permute": (lambda x: x.permute(2, 0, 1), ["permute"]),
    "torch.permute": (lambda x: torch.permute(x, (2, 0, 1)), ["permute"]),
    "swapaxes": (lambda x: x.swapaxes(1, 2), ["transpose"]),
    "mT": (lambda x: x.mT, ["transpose"]),
    "flatten": (lambda x: x.flatten(1), ["flatten"]),
    "unflatten": (lambda x: x.unflatten(-1, [2, 3]), ["unflatten"]),
    "unsqueeze": (lambda x: x.unsqueeze(dim=1), ["unsqueeze"]),
    "squeeze": (lambda x: x.unsqueeze(1).squeeze(1), ["unsqueeze", "squeeze"]),
    "squeeze of nothing": (lambda x: x.squeeze(-1).neg(), ["neg"]),
    "flip": (lambda x: x.flip(1), ["flip"]),
    "cat": (lambda x: torch.cat((x, x), dim=-1), ["cat"]),
    "F.pad": (lambda x: F.pad(x, (0, 0, 1, 2)), ["pad"]),
    "F.pad with a number": (lambda x: F.pad(x, (1, 0), value=3.0), ["pad"]),
    "stack": (lambda x: torch.stack([x, x]), ["stack"]),
    "chunk": (lambda x: x.chunk(4, dim=-1)[2], ["split", "getitem"]),
    "split by size": (lambda x: x.split(4, -1)[-1], ["split", "getitem"]),
    "split by sizes": (lambda x: torch.split(x, (1, 5), dim=2)[1], ["split", "getitem"]),
    "slice of a tuple": (
        lambda x: sum(x.split(2, -1)[1:]),
        ["split", "getitem", "getitem", "add", "add"],
    ),
    "x[..., 2:]": (lambda x: x[..., 2:], ["getitem"]),
    "x[:, :, :]": (lambda x: x[:, 0:, :].neg(), ["neg"]),
    "x[:, -1]": (lambda x: x[:, -1], ["getitem"]),
    "last by length": (lambda x: x[:, x.shape[1] - 1 :], ["size", "sub", "getitem"]),
    "F.linear": (lambda x: F.linear(x, W), ["ssmc::linear"]),
    "F.rms_norm": (lambda x: F.rms_norm(x, (6,), Y), ["ssmc::rms_norm"]),
    "nn.RMSNorm": (nn.RMSNorm(6, eps=1e-3), ["ssmc::rms_norm"]),
    "nn.LayerNorm": (nn.LayerNorm(6), ["ssmc::layer_norm"]),
    "nn.LayerNorm without bias": (nn.LayerNorm(6, bias=False), ["ssmc::layer_norm"]),
    "no-op casts": (lambda x: x.float().to(x.dtype).to(x.device).type_as(x).neg(), ["neg"]),
    "identities": (lambda x: x.contiguous().clone().detach().neg(), ["neg"]),
    "nn.Dropout": (nn.Sequential(nn.Dropout(0.5), nn.Tanh()), ["tanh"]),
    "cast": (lambda x: x.double().to(torch.float32), ["to_dtype", "to_dtype"]),
    "equal extents": (lambda x: x.neg() if x.shape == x.exp().shape else x, ["neg"]),
    "kwargs": (lambda x: torch.add(input=x, other=Y), ["add"]),
}


class Of(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def operators(graph: Graph) -> list[str]:
    return [dialect.target_name(n.target) for n in graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spelling(spelling: str) -> None:
    function, expected = SPELLINGS[spelling]
    module = Of(function).eval()
    graph = trace(module, torch.zeros(2, 5, 6))
    assert operators(graph) == expected
    for batch, length in ((2, 5), (1, 1), (4, 9)):
        x = torch.rand(batch, length, 6) + 0.1
        with torch.no_grad():
            wanted = module(x)
        actual = graph(x)[0]
        assert actual.shape == wanted.shape
        assert error(actual, wanted) < 1e-6


def test_shape_arguments_have_one_form() -> None:
    graph = trace(Of(lambda x: x.view(-1, 2, 3).permute([1, 0, 2])), torch.zeros(2, 5, 6))
    reshape, permute = (n for n in graph.nodes if n.op == "call_function")
    assert reshape.args[1] == (-1, 2, 3)
    assert permute.args[1] == (1, 0, 2)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: torch.add(x, x, alpha=2), "alpha"),
        (lambda x: x.split(2, dim=1)[0], "split into a number of parts"),
        (lambda x: x.sum(dtype=torch.float64), "another dtype"),
        (lambda x: F.dropout(x), "dropout"),
        (lambda x: F.pad(x, (1, 1), "reflect"), "padding with mode 'reflect'"),
        (lambda x: F.rms_norm(x, (5, 6)), "more than the last dimension"),
        (lambda x: F.conv1d(x.mT, torch.zeros(6, 6, 1)), "'conv1d' is not in the dialect"),
        (lambda x: torch.ops.aten.cumsum(x, 1), "'aten::cumsum' is not in the dialect"),
    ],
)
def test_forms_outside_the_dialect(function: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        trace(Of(function), torch.zeros(2, 5, 6))


@torch.library.custom_op("frontend_test::double", mutates_args=())
def double(x: Tensor, times: int = 1) -> Tensor:
    return x * 2**times


@double.register_fake
def _(x: Tensor, times: int = 1) -> Tensor:
    return torch.empty_like(x)


def test_registered_operator_of_the_user_is_kept() -> None:
    module = Of(lambda x: double(x, times=3) - x)
    with pytest.raises(UnsupportedError, match="'frontend_test::double' is not") as caught:
        trace(module, torch.zeros(2, 5, 6))
    assert "allow_operators('frontend_test')" in str(caught.value.hint)
    dialect.allow_operators("frontend_test")
    graph = trace(module, torch.zeros(2, 5, 6))
    assert operators(graph) == ["frontend_test::double", "sub"]
    assert graph.calls("frontend_test::double")[0].args[1:] == (3,)
    x = torch.rand(3, 2, 6)
    assert torch.equal(graph(x)[0], 7 * x)
