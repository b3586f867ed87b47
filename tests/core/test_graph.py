"""The graph: rewriting it leaves the module and its copies as they were."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from ssmc.core import dialect
from ssmc.core.graph import Graph, check_finite, infer
from ssmc.core.state import StateSpec
from ssmc.errors import NumericsError, PassError
from ssmc.frontend import trace

from .tiny import apply, context, error, graph, language_model, logits, toy

X = torch.linspace(-2, 3, 2 * 7 * 6).reshape(2, 7, 6)


def test_rewriting_leaves_the_module_as_it_was() -> None:
    module, g = toy()
    before = {name: (id(p), p.detach().clone()) for name, p in module.named_parameters()}
    expected = module(X).detach()
    for node in g.nodes:
        if node.op == "get_attr":
            g.set_param(node, g.param(node) * 2)
    g.finish()
    assert error(g(X)[0], expected) > 0.1
    for name, parameter in module.named_parameters():
        assert (id(parameter), True) == (before[name][0], torch.equal(parameter, before[name][1]))
    assert torch.equal(module(X), expected)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_all_passes_leave_the_model_and_the_copy_as_they_were(kind: str) -> None:
    model = language_model(kind)
    ids = context().probe[0]  # type: ignore[index]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    g = trace(model)
    twin = g.copy()
    nodes, expected = [n.format_node() for n in twin.nodes], twin(ids)[0]
    apply(g, "hadamard{residual=true},smooth,percentile,quantise")
    assert [n.format_node() for n in twin.nodes] == nodes
    assert torch.equal(twin(ids)[0], expected)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_copy_is_independent_both_ways() -> None:
    _, g = toy()
    twin = g.copy()
    result = g(X)[0]
    gamma = next(n for n in twin.nodes if n.target == "gamma")
    twin.set_param(gamma, torch.zeros(6))
    twin.new_param("extra.scale", torch.ones(3))
    twin.finish()
    assert torch.equal(g(X)[0], result)
    assert "extra.scale" not in dict(g.module.named_buffers())
    assert not torch.equal(twin(X)[0], result)
    assert all(n.meta is not m.meta for n, m in zip(g.nodes, g.copy().nodes, strict=True))


def test_copy_keeps_states_names_and_ranges() -> None:
    g = graph("mamba")
    g.ranges["somewhere"] = object()
    twin = g.copy()
    assert (twin.inputs, twin.states, twin.ranges) == (g.inputs, g.states, g.ranges)
    assert [n.name for n in twin.nodes] == [n.name for n in g.nodes]
    twin.ranges.clear()
    assert g.ranges


def test_call_infers_value_and_takes_owner_and_layer() -> None:
    g = graph("mamba")
    out_proj = g.node("backbone_layers_1_mixer_out_proj")
    with g.before(out_proj):
        half = g.call("mul", out_proj.args[0], 0.5, like=out_proj, suffix="half")
    assert half.name == "backbone_layers_1_mixer_out_proj_half"
    assert half.meta["val"].shape == out_proj.args[0].meta["val"].shape  # type: ignore[union-attr]
    assert (half.meta["owner"], half.meta["layer"]) == ("backbone.layers.1.mixer.out_proj", 1)
    assert half.next is out_proj


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("softmax", (X, -1)), ("softmax", (X, 1)), ("sum", (X, 2)), ("sum", (X, -1, True)),
        ("sum", (X, -3, True)), ("mean", (X, -2, False)), ("sum", (X.long(), 1)),
        ("add", (X.long(), 3)), ("mul", (X.long(), X.long()[:1])), ("add", (X.long(), 0.5)),
        ("truediv", (X.long(), 2)), ("add", (X > 0, X > 1)), ("sub", (X.int(), X.long())),
        ("sum", (X, [0, 1])), ("mean", (X, -1, True)),
    ],
)  # fmt: skip
def test_values_are_inferred_as_torch_gives_them(name: str, args: tuple[Any, ...]) -> None:
    expected = dialect.FUNCTIONS[name](*args)
    given = fx.Graph()
    nodes = []
    for value in args:
        if isinstance(value, Tensor):
            nodes.append(given.placeholder("x"))
            nodes[-1].meta["val"] = value.to("meta")
        else:
            nodes.append(value)
    found = infer(given.call_function(dialect.FUNCTIONS[name], tuple(nodes)))
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.is_meta


def test_replace_spares_the_new_node_and_drops_the_old() -> None:
    _, g = toy()
    norm = g.calls("ssmc::rms_norm")[0]
    users = list(norm.users)
    with g.after(norm):
        double = g.call("mul", norm, 2.0, like=norm)
    g.replace(norm, double)
    assert double.args[0] is norm
    assert list(norm.users) == [double]
    assert list(double.users) == users
    unused = double
    g.replace(unused, norm)
    assert "mul" not in {n.name for n in g.nodes if n is unused}
    assert list(norm.users) == users


def test_finish_prunes_calls_and_tensors() -> None:
    _, g = toy()
    norm = g.calls("ssmc::rms_norm")[0]
    g.new_param("deep.down.unused", torch.ones(3))
    g.replace(norm, norm.args[0])  # type: ignore[arg-type]
    g.finish()
    assert set(g.params()) == {"up.weight", "down.weight", "down.bias"}
    assert set(dict(g.module.named_buffers())) == set(g.params())
    assert not hasattr(g.module, "deep")


def test_finish_infers_values_anew() -> None:
    _, g = toy()
    up, down = (next(n for n in g.nodes if n.target == f"{part}.weight") for part in ("up", "down"))
    g.set_param(up, torch.ones(14, 6))
    g.set_param(down, torch.ones(6, 14))
    g.finish()
    assert {n.meta["val"].shape[-1] for n in g.calls("ssmc::linear")} == {14, 6}


def test_tied_weight_is_one_node() -> None:
    g = graph("mamba")
    (weight,) = [n for n in g.nodes if n.target == "backbone.embeddings.weight"]
    assert {n.name for n in weight.users} == {"backbone_embeddings", "lm_head"}
    g.set_param(weight, g.param(weight) * 0)
    g.finish()
    assert not logits(g).any()


@pytest.mark.parametrize("name", ["fresh", "gamma", "up.weight"])
def test_new_param_never_overwrites(name: str) -> None:
    _, g = toy()
    expected = g(X)[0]
    first, second = (g.new_param(name, torch.full((2,), float(i))) for i in range(2))
    assert torch.equal(g.param(first), torch.zeros(2))
    assert torch.equal(g.param(second), torch.ones(2))
    assert str(second.target).startswith(f"{name}_")
    g.module.recompile()
    assert torch.equal(g(X)[0], expected)


def test_new_param_of_the_root_module() -> None:
    _, g = toy()
    assert g.new_param(".weight", torch.ones(2)).target == "weight"


def test_set_param_and_param_refuse_a_call() -> None:
    _, g = toy()
    norm = g.calls("ssmc::rms_norm")[0]
    with pytest.raises(PassError, match=f"'{norm.name}' is computed"):
        g.param(norm)
    with pytest.raises(PassError, match=f"'{norm.name}' is computed"):
        g.set_param(norm, torch.ones(3))


def _places(g: Graph, *nodes: fx.Node) -> list[int]:
    order = g.nodes
    return [order.index(n) for n in nodes]


def test_after_a_call_is_right_behind_it() -> None:
    _, g = toy()
    norm = g.calls("ssmc::rms_norm")[0]
    with g.after(norm):
        new = g.call("neg", norm, like=norm)
    assert norm.next is new


def test_after_an_input_is_behind_all_inputs_and_before_every_call() -> None:
    g = graph("mamba")
    ids = g.nodes[0]
    with g.after(ids):
        new = g.call("neg", ids, like=g.calls("ssmc::embedding")[0])
    calls = [n for n in g.nodes if n.op == "call_function"]
    assert calls[0] is new
    inputs = [n for n in g.nodes if n.op == "placeholder"]
    assert max(_places(g, *inputs)) < _places(g, new)[0]
    g.finish()
    assert new not in g.nodes


def test_new_param_stands_before_its_readers_and_behind_the_inputs() -> None:
    g = graph("mamba")
    node = g.new_param("first", torch.ones(()))
    assert [n.op for n in g.nodes[: len(g.states) + 2]] == ["placeholder"] * 5 + ["get_attr"]
    assert g.nodes[len(g.states) + 1] is node


def test_watch_shows_every_value_and_gives_the_result() -> None:
    _, g = toy()
    seen: dict[str, Any] = {}
    result = g.watch(lambda node, value: seen.update({node.name: value}), X)
    assert torch.equal(result, g(X)[0])
    assert list(seen) == [n.name for n in g.nodes if n.op != "output"]
    assert torch.equal(seen[g.result.name], result)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_watch_keeps_what_is_still_read(kind: str) -> None:
    g = graph(kind)
    probe = context().probe or ()
    calls = [n for n in g.nodes if n.op == "call_function"]
    values: dict[fx.Node, weakref.ref[torch.Tensor]] = {}

    def seen(node: fx.Node, value: Any) -> None:
        for part in value if isinstance(value, list | tuple) else [value]:
            values[node] = weakref.ref(part)  # the last of several
        if node.op == "call_function":
            to_come = set(calls[calls.index(node) + 1 :])
            read = {n for n in values if n is node or to_come & n.users.keys()}
            assert _memory(values, set(values) - inputs) <= _memory(values, read | inputs)

    inputs = {g.node(name) for name in g.inputs}
    assert torch.equal(g.watch(seen, *probe), g(*probe)[0])
    assert {n.name for n in values if n.op == "placeholder"} == {
        *g.inputs, *(spec.name for spec in g.states)
    }  # fmt: skip


def _memory(values: dict[fx.Node, weakref.ref[torch.Tensor]], nodes: set[fx.Node]) -> set[int]:
    """Where the values of nodes lie that are there still, but for parameters."""
    alive = (values[node]() for node in nodes if node.op != "get_attr")
    return {value.untyped_storage().data_ptr() for value in alive if value is not None}


def test_states_are_taken_and_given() -> None:
    g = graph("mamba2")
    ids = context().probe[0]  # type: ignore[index]
    whole, last = g(ids)
    first, states = g(ids[:, :9])
    second, states = g(ids[:, 9:], states=states)
    assert error(torch.cat([first, second], 1), whole) < 1e-5
    assert list(states) == [s.name for s in g.states]
    assert all(error(states[name], last[name]) < 1e-5 for name in states)


def test_a_further_state_is_kept_until_another_value_is_carried() -> None:
    g = graph("mamba")
    ids = context().probe[0]  # type: ignore[index]
    count = g.add_state("count", torch.zeros(1, 3, dtype=torch.int32), g.node("l0_ssm"))
    assert g.states[-1] == StateSpec("count", (3,), torch.int32)
    assert (count.meta["layer"], g.new_states[-1]) == (0, count)
    g.finish()
    assert torch.equal(g(ids)[1]["count"], torch.zeros(len(ids), 3, dtype=torch.int32))
    with g.after(count):
        g.carry(count, g.call("add", count, 1, like=count))
    g.finish()
    states = g(ids, states=g(ids)[1])[1]
    assert torch.equal(states["count"], torch.full((len(ids), 3), 2, dtype=torch.int32))
    assert list(states) == [spec.name for spec in g.states]
    g.set_state(g.node("l0_ssm"), torch.zeros(9, 4, dtype=torch.int8))
    assert StateSpec("l0_ssm", (4,), torch.int8) in g.states


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_check_finite_names_node_or_tensor(bad: float) -> None:
    _, g = toy()
    norm = g.calls("ssmc::rms_norm")[0]
    gamma = next(n for n in g.nodes if n.op == "get_attr")
    value = torch.tensor([1.0, bad])
    with pytest.raises(NumericsError, match=f"^node '{norm.name}' holds NaN or infinity"):
        check_finite(norm, (torch.ones(2), value))
    with pytest.raises(NumericsError, match=f"^tensor '{gamma.target}' holds NaN or infinity"):
        check_finite(gamma, value)
    check_finite(norm, (torch.ones(2), torch.tensor([3]), None, 5))


def test_node_by_name() -> None:
    _, g = toy()
    assert g.node(g.nodes[0].name) is g.nodes[0]
    assert isinstance(g.result, fx.Node)
    assert g.new_states == ()


def test_call_of_an_input_tensor_keeps_autograd_out() -> None:
    module, g = toy()
    result: Tensor = g(X)[0]
    assert not result.requires_grad
    assert error(result, module(X).detach()) < 1e-6
