"""Patterns: what they match and what they capture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from ssmc import ops
from ssmc.core import Graph, is_call, op
from ssmc.core.pattern import Pattern
from ssmc.frontend import trace

from .tiny import toy


@pytest.fixture
def g() -> Graph:
    return toy()[1]


def _found(g: Graph, pattern: Pattern) -> list[fx.Node]:
    return [n for n in g.nodes if pattern.match(n)]


def test_captures_and_nesting(g: Graph) -> None:
    match = op.linear(op.rms_norm("x", "gamma"), "weight").match(g.calls("ssmc::linear")[0])
    assert match is not None
    assert match.x is g.nodes[0]
    assert (match.gamma.target, match.weight.target) == ("gamma", "up.weight")
    assert match.node is g.calls("ssmc::linear")[0]
    with pytest.raises(AttributeError, match="captures no 'W'"):
        _ = match.W


def test_a_label_captures_the_call_and_stands_for_one(g: Graph) -> None:
    first = g.calls("ssmc::linear")[0]
    norm = op.rms_norm("x", label="norm")
    match = op.linear(norm).match(first)
    assert match is not None
    assert is_call(match.norm, "ssmc::rms_norm")
    assert match.x is g.nodes[0]
    assert op.linear(op.rms_norm("same", label="same")).match(first) is None


def test_only_where_it_holds(g: Graph) -> None:
    first, second, third = g.calls("ssmc::linear")
    assert _found(g, op.linear(op.rms_norm())) == [first]
    assert _found(g, op.linear(op.add())) == [third]
    assert _found(g, op.linear()) == [first, second, third]
    assert op.linear().match(None) is None


def test_literals(g: Graph) -> None:
    first, second, third = g.calls("ssmc::linear")
    assert _found(g, op.linear("x", "w", None)) == [first, second]
    assert _found(g, op.linear("x", "w", "b", False)) == [first, second, third]
    assert _found(g, op.linear("x", "w", "b", True)) == []
    assert _found(g, op.linear("x", "w", None, None)) == []
    norms = g.calls("ssmc::rms_norm")
    assert _found(g, op.rms_norm("x", "w", float("1e-5"))) == norms
    assert _found(g, op.rms_norm("x", "w", 1e-6)) == []


def test_an_operand_that_is_not_there_does_not_match(g: Graph) -> None:
    assert _found(g, op.add("a", "b"))
    assert _found(g, op.add("a", "b", "alpha")) == []


def test_role_and_sole_user(g: Graph) -> None:
    first, second, _ = g.calls("ssmc::linear")
    second.meta["role"] = "odd"
    assert _found(g, op.linear(role="odd")) == [second]
    assert _found(g, op.rms_norm(sole_user=True)) == g.calls("ssmc::rms_norm")
    with g.after(first):
        g.call("neg", g.calls("ssmc::rms_norm")[0], like=first)
    assert _found(g, op.rms_norm(sole_user=True)) == []
    assert _found(g, op.linear(op.rms_norm(sole_user=True))) == []
    assert _found(g, op.linear(op.rms_norm())) == [first]


def test_one_name_captures_one_value() -> None:
    class Squares(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return ops.linear(x * x + x * y, torch.ones(6, 6))

    g = trace(Squares(), (torch.zeros(2, 3, 6), torch.zeros(2, 3, 6)))
    products = [n for n in g.nodes if is_call(n, "mul")]
    assert _found(g, op.mul("a", "b")) == products
    assert _found(g, op.mul("a", "a")) == products[:1]
    assert _found(g, op.add(op.mul("a", "a"), op.mul("a", "b"))) == g.calls("add")
    assert _found(g, op.add(op.mul("a", "b"), op.mul("b", "a"))) == []
