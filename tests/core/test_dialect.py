"""The closed set of operators."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import fx

import ssmc
from ssmc.core import dialect
from ssmc.errors import UnsupportedError

from .tiny import toy


@pytest.mark.parametrize("name", dialect.known_names())
def test_every_name_resolves_to_what_bears_it(name: str) -> None:
    target = dialect.resolve(name)
    assert dialect.is_legal(target)
    assert dialect.target_name(target) == name


@pytest.mark.parametrize(
    "name",
    [
        *("aten::add", "aten::add.Tensor", "eval", "os::system", "operator.add", "", "::"),
        *("ssmc::", "ssmc::__class__", "ssmc::name", "ssmc::linear.out"),
        *("ssmc::linear.__class__", "ssmc::linear.__call__", "ssmc::linear.__setattr__"),
    ],
)
def test_nothing_else_resolves(name: str) -> None:
    with pytest.raises(UnsupportedError, match="is not in the dialect") as caught:
        dialect.resolve(name)
    assert caught.value.hint
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("name", "meant"),
    [("ssmc::liner", "ssmc::linear"), ("sofmax", "softmax"), ("ssmc::ssdscan", "ssmc::ssd_scan")],
)
def test_did_you_mean(name: str, meant: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        dialect.resolve(name)
    assert str(caught.value.hint).startswith(f"did you mean {meant}")


@pytest.mark.parametrize("target", [torch.ops.aten.relu.default, torch.sort, torch.add, print])
def test_other_functions_are_illegal(target: object) -> None:
    assert not dialect.is_legal(target)


@pytest.fixture
def _library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dialect, "_namespaces", {"ssmc"})
    library = torch.library.Library("tinylib", "DEF")
    library.define("scaled(Tensor x, float by=2.0) -> Tensor")
    library.define("scaled.int(Tensor x, int by) -> Tensor")
    library.impl("scaled", lambda x, by=2.0: x * by, "CompositeExplicitAutograd")
    yield
    library._destroy()


@pytest.mark.usefixtures("_library")
def test_allowed_namespace() -> None:
    overloads = torch.ops.tinylib.scaled
    with pytest.raises(UnsupportedError) as caught:
        dialect.resolve("tinylib::scaled")
    assert "ssmc.allow_operators('tinylib')" in str(caught.value.hint)
    assert not dialect.is_legal(overloads.default)
    ssmc.allow_operators("tinylib")
    assert dialect.is_legal(overloads.default)
    for name, target in (("scaled", overloads.default), ("scaled.int", overloads.int)):
        assert dialect.resolve(f"tinylib::{name}") is target
        assert dialect.target_name(target) == f"tinylib::{name}"
    with pytest.raises(UnsupportedError):
        dialect.resolve("tinylib::absent")


def test_operands_in_schema_order_with_defaults() -> None:
    graph = fx.Graph()
    x, weight, state = (graph.placeholder(name) for name in ("x", "weight", "state"))
    target = torch.ops.ssmc.causal_conv1d.default
    node = graph.call_function(target, (x, weight), {"activation": "silu", "state": state})
    expected = {"x": x, "weight": weight, "bias": None, "state": state, "activation": "silu"}
    assert list(dialect.operands(node).items()) == list({**expected, "exact": False}.items())
    split = graph.call_function(torch.split, (x, [1, 2]), {"dim": -1})
    assert dialect.operands(split) == {"0": x, "1": [1, 2], "dim": -1}


def test_traced_graphs_stay_inside() -> None:
    _, g = toy()
    assert all(dialect.is_legal(n.target) for n in g.nodes if n.op == "call_function")
