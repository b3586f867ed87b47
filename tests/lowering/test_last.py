"""The result of the last position: what runs on one position, and what does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tiny import compile_tiny
from torch import Tensor, nn

from ssmc import ops
from ssmc.core import Graph
from ssmc.core.dialect import target_name
from ssmc.core.graph import LENGTH
from ssmc.frontend import trace
from ssmc.lowering.last import LAST, take_last

from .rules import fused


def selections(g: Graph) -> list[str]:
    """The values of which the last position is taken."""
    found = [n for n in g.calls("getitem") if n.args[1] == LAST]
    return [n.args[0].name for n in found]  # type: ignore[union-attr]


def lengths(g: Graph, name: str) -> list[int]:
    return [n.meta["val"].shape[1] for n in g.calls(name)]


def test_the_head_and_the_end_of_the_last_layer_run_on_one_position() -> None:
    g = fused(compile_tiny("mamba").graph, "last").graph
    assert lengths(g, "ssmc::int8_linear") == [1]
    assert lengths(g, "ssmc::int8_linear_add") == [LENGTH, LENGTH, 1]
    assert lengths(g, "ssmc::int8_linear_quantize") == [LENGTH] * 6
    taken = selections(g)
    assert sorted(taken) == ["backbone_layers_1_add", "backbone_layers_2_mixer_y"]


def test_a_gate_is_taken_where_it_leaves_in_proj() -> None:
    g = fused(compile_tiny("mamba2").graph, "last").graph
    norms = [n.meta["val"][0].shape[1] for n in g.calls("ssmc::gated_norm_quantize")]
    assert norms == [LENGTH, LENGTH, 1]
    taken = set(selections(g))
    assert {"backbone_layers_1_add", "backbone_layers_2_mixer_z_q"} < taken
    assert len(taken) == 3  # and the scan's result


class Function(nn.Module):
    """A module that computes what it is given."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> object:
        return self.function(x, self.weight)


def narrowed(function: Callable[..., object], x: Tensor) -> Graph:
    """The graph of `function`, with the result of its last position; checked against the whole."""
    whole = trace(Function(function), (x,))
    g = whole.copy()
    take_last(g)
    g.finish()
    (expected, _), (got, _) = whole(x), g(x)
    for one, other in zip(_members(got), _members(expected), strict=True):
        last = other[:, -1:] if other.shape[1] == x.shape[1] else other
        assert torch.allclose(one, last, atol=1e-5)
    return g


def _members(value: object) -> list[Tensor]:
    return list(value) if isinstance(value, tuple | list) else [value]  # type: ignore[list-item]


X = torch.randn(2, 5, 8)


def test_position_wise_calls_all_run_on_one_position() -> None:
    def block(x: Tensor, weight: Tensor) -> Tensor:
        a, b = ops.linear(x, weight).split([3, 5], -1)
        y = ops.rms_norm(b.unflatten(-1, (5, 1)).flatten(-2, -1)) * 2 + b
        return ops.linear(y, weight[:, :5]) * F.silu(ops.linear(a, weight[:, :3]))

    assert selections(narrowed(block, X)) == ["x"]


def test_a_residual_is_taken_once() -> None:
    def block(x: Tensor, weight: Tensor) -> Tensor:
        y, _ = ops.causal_conv1d(x, weight[:, :3])
        x = x + y
        z, _ = ops.causal_conv1d(x, weight[:, :2])
        return ops.linear(z, weight) + x + ops.rms_norm(x)

    g = narrowed(block, X)
    taken = selections(g)
    assert len(taken) == len(set(taken)) == 2
    assert lengths(g, "ssmc::linear") == lengths(g, "ssmc::rms_norm") == [1]


@pytest.mark.parametrize(
    "mixes",
    [
        lambda x, w: torch.softmax(x, 1),
        lambda x, w: ops.causal_conv1d(x, w[:, :3])[0],
        lambda x, w: torch.matmul(torch.matmul(x, x.transpose(1, 2)), x),
        lambda x, w: torch.flip(x, (1,)),
        lambda x, w: x + torch.mean(x, 1, keepdim=True),
    ],
)
def test_what_mixes_positions_runs_on_all(mixes: Callable[..., Tensor]) -> None:
    g = narrowed(lambda x, w: ops.linear(mixes(ops.rms_norm(x), w), w), X)
    assert lengths(g, "ssmc::rms_norm") == [LENGTH]
    assert lengths(g, "ssmc::linear") == [1]


def test_a_result_without_positions_stays() -> None:
    g = narrowed(lambda x, w: ops.linear(torch.mean(x, 1), w), X)
    assert selections(g) == []
    g = narrowed(lambda x, w: (ops.linear(x, w), torch.mean(x, 1)), X)
    assert selections(g) == ["x"]


def test_an_operand_with_positions_elsewhere_stops_the_selection() -> None:
    def block(x: Tensor, weight: Tensor) -> Tensor:
        positions = torch.mean(x, (0, 2)).unsqueeze(-1)  # [L, 1], lined up with the length
        return torch.exp(x * positions)

    g = narrowed(block, X)
    assert [target_name(n.target) for n in g.nodes if n.name == selections(g)[0]] == ["mul"]
