"""Anyone's own module: traced from its operators, with states by adapters, or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmc import ops
from ssmc.core import dialect
from ssmc.core.graph import Graph
from ssmc.core.state import States, StateSpec
from ssmc.errors import UnsupportedError, UsageError
from ssmc.frontend import register_adapter, trace

from .models import build, error, tokens

SHAPES = [(2, 5), (1, 1), (3, 33)]


class Bidirectional(nn.Module):
    """A selective scan in both directions, without gates, from an initial state it is given."""

    def __init__(self, width: int = 14, rank: int = 6) -> None:
        super().__init__()
        self.width, self.rank = width, rank
        self.inputs = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(width)
        self.select = nn.Linear(width, width + 2 * rank, bias=False)
        self.conv = nn.Conv1d(width, width, 4, groups=width)
        self.A_log = nn.Parameter(torch.rand(width, rank))
        self.register_buffer("scale", torch.rand(width))
        self.offset = torch.rand(width)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, _ = x.shape
        u, skip = self.inputs(self.norm(x)).chunk(2, -1)
        u, _ = ops.causal_conv1d(u, self.conv.weight.squeeze(1), self.conv.bias, activation="silu")
        dt, B, C = torch.split(self.select(u), [self.width, self.rank, self.rank], dim=-1)
        A = -torch.exp(self.A_log)
        there, new_state = ops.selective_scan(u, dt, A, B, C, state=state)
        back, _ = ops.selective_scan(u, dt, A, B, C, reverse=True)
        y = (there + back) * self.scale + torch.tensor(0.5) + self.offset
        y = y.reshape(batch * length, -1).view(batch, length, self.width)
        return F.gelu(y) + skip, new_state


def run(module: nn.Module, *inputs: Tensor) -> Any:
    with torch.no_grad():
        return module(*inputs)


@pytest.fixture(scope="module")
def bidirectional() -> tuple[nn.Module, Graph]:
    module = Bidirectional()
    return module, trace(module, (torch.zeros(2, 5, 14), torch.zeros(2, 14, 6)))


@pytest.mark.parametrize(("batch", "length"), SHAPES)
def test_module_of_operators(
    bidirectional: tuple[nn.Module, Graph], batch: int, length: int
) -> None:
    module, graph = bidirectional
    inputs = torch.randn(batch, length, 14), torch.randn(batch, 14, 6)
    actual, states = graph(*inputs)
    assert states == {}
    for mine, theirs in zip(actual, run(module, *inputs), strict=True):
        assert error(mine, theirs) < 1e-6


def test_its_graph(bidirectional: tuple[nn.Module, Graph]) -> None:
    module, graph = bidirectional
    assert graph.inputs == ("x", "state")
    assert not graph.calls("squeeze")
    assert graph.params()["conv.weight"].shape == (14, 4)
    assert {"scale", "offset", "A_log", "constant_0"} <= graph.params().keys()
    assert not hasattr(module, "constant_0")
    assert graph.node("inputs").meta["owner"] == "inputs"
    assert all(dialect.is_legal(n.target) for n in graph.nodes if n.op == "call_function")


class Decay(nn.Module):
    """A leaky integrator whose forward knows nothing of states."""

    def __init__(self) -> None:
        super().__init__()
        self.keep = nn.Parameter(torch.rand(7))

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("its adapter is traced instead")


def decay(module: Decay, state: dict[str, Tensor], x: Tensor) -> Tensor:
    rate = torch.log(module.keep).unsqueeze(-1)
    ones = x.mean(-1, keepdim=True) * 0 + 1
    dt = x * 0 + 1
    y, state["level"] = ops.selective_scan(
        x, dt, rate, ones, ones, state=state["level"], softplus=False
    )
    return y


class Decays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Decay(), Decay()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) + x


@pytest.fixture
def _decay_adapter() -> Iterator[None]:
    remove = register_adapter(
        lambda module: isinstance(module, Decay), decay, lambda module: {"level": (7, 1)}
    )
    yield
    remove()


@pytest.mark.usefixtures("_decay_adapter")
def test_registered_adapter_keeps_states() -> None:
    module = Decays()
    graph = trace(module, torch.zeros(2, 5, 7))
    assert graph.states == (StateSpec("l0_level", (7, 1)), StateSpec("l1_level", (7, 1)))
    x = torch.randn(2, 12, 7)
    whole, last = graph(x)
    first, states = graph(x[:, :5])
    second, states = graph(x[:, 5:], states=states)
    assert error(torch.cat([first, second], 1), whole) < 1e-6
    assert error(states["l1_level"], last["l1_level"]) < 1e-6
    by_hand = torch.zeros(2, 7)
    for t in range(12):
        by_hand = by_hand * module.first.keep.detach() + x[:, t]
    assert error(last["l0_level"].squeeze(-1), by_hand) < 1e-5


@pytest.mark.usefixtures("_decay_adapter")
def test_stateful_module_called_twice_is_refused() -> None:
    class Twice(Decays):
        def forward(self, x: Tensor) -> Tensor:
            return self.first(self.first(x))

    with pytest.raises(
        UnsupportedError, match="'first' keeps a state and is called more than once"
    ):
        trace(Twice(), torch.zeros(2, 5, 7))


def test_last_registered_adapter_comes_first() -> None:
    linear = nn.Linear(5, 3)
    remove = register_adapter(lambda m: m is linear, lambda m, x: ops.linear(x, m.weight) * 2)
    try:
        graph = trace(linear, torch.zeros(2, 4, 5))
        assert len(graph.calls("mul")) == 1
    finally:
        remove()
    assert not trace(linear, torch.zeros(2, 4, 5)).calls("mul")


def test_inputs_are_called_as_their_nodes_are() -> None:
    class Sum(nn.Module):
        def forward(self, input: Tensor, *rest: Tensor) -> Tensor:
            return input + rest[0].unsqueeze(1) + rest[1]

    examples = torch.zeros(2, 5, 3), torch.zeros(2, 3), torch.zeros(2, 1, 3)
    graph = trace(Sum(), examples)
    assert graph.inputs == tuple(n.name for n in graph.nodes if n.op == "placeholder")
    inputs = torch.randn(4, 9, 3), torch.randn(4, 3), torch.randn(4, 1, 3)
    assert torch.equal(graph(*inputs)[0], Sum()(*inputs))


def of(function: Callable[..., Any]) -> nn.Module:
    """A module with a 6-to-6 projection, whose forward is `function(module, x)`."""

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(6, 6))

        def forward(self, x: Tensor) -> Any:
            return function(self, x)

    return Module()


def assign(_: nn.Module, x: Tensor) -> Tensor:
    x[:, 0] = 0
    return x


UNSOUND = {
    "sort": (lambda m, x: m.inner(x).sort(-1)[0], "operator 'Tensor.sort' is not in the dialect"),
    "in-place method": (lambda m, x: m.inner(x).add_(1), "operator 'Tensor.add_'"),
    "in-place function": (lambda m, x: F.silu(x, inplace=True), "in place"),
    "assignment": (assign, "an assignment into a tensor"),
    "branch on length": (lambda m, x: x if x.shape[1] > 1 else -x, "depends on the batch size"),
    "branch on equality": (lambda m, x: x if x.shape[1] == 1 else -x, "depends on the batch size"),
    "branch on values": (lambda m, x: x if x.sum() else -x, "as a number"),
    "loop over length": (lambda m, x: sum(x[:, t] for t in range(x.shape[1])), "as a number"),
    "loop over tensor": (lambda m, x: sum(row for row in x), "as a number"),
    "baked extent": (lambda m, x: x.reshape(x.numel() // 6, 6), "'reshape' holds 1022117"),
    "baked stride": (lambda m, x: x.reshape(x.stride(0) // 6, -1), "'reshape' holds 1013"),
    "wrong shapes": (lambda m, x: x @ torch.zeros(5, 2), "RuntimeError"),
    "result": (lambda m, x: {"y": x}, "returns dict"),
}


@pytest.mark.parametrize("name", UNSOUND)
def test_what_no_graph_can_hold_is_refused(name: str) -> None:
    function, message = UNSOUND[name]
    with pytest.raises(UnsupportedError, match=message) as caught:
        trace(of(function), torch.zeros(2, 5, 6))
    assert caught.value.exit_code == 3
    assert caught.value.hint


class Deep(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(x, 1)


def test_message_names_operator_module_and_line() -> None:
    module = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.SiLU(), Deep()))
    with pytest.raises(UnsupportedError) as caught:
        trace(module, torch.zeros(2, 5, 6))
    line = Deep.forward.__code__.co_firstlineno + 1
    message = str(caught.value)
    assert message.startswith(f"cannot trace Deep at '1.1', {__file__}:{line}: operator 'cumsum'")


@pytest.mark.parametrize(
    ("module", "inputs", "message"),
    [
        (nn.Linear(6, 6), None, "Linear is not a Hugging Face causal language model"),
        (nn.Linear(6, 6), (), "example_inputs must be tensors"),
        (nn.Linear(6, 6), (torch.tensor(1.0),), "example_inputs must be tensors"),
        (nn.Linear(6, 6), (torch.zeros(2, 6), torch.zeros(2, 6)), "does not take 2 inputs"),
    ],
)
def test_wrong_example_inputs(module: nn.Module, inputs: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        trace(module, inputs)
    assert caught.value.exit_code == 2


def test_language_model_without_mixers_is_refused() -> None:
    import transformers as hf

    config = hf.GPTNeoXConfig(
        vocab_size=31,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    with pytest.raises(
        UnsupportedError, match=r"in_proj.*q_proj.*found in 'gpt_neox.layers.0' a GPTNeoXLayer"
    ):
        trace(hf.GPTNeoXForCausalLM(config))


def test_mixer_with_further_tensors_is_not_taken_for_one() -> None:
    model = build("mamba")
    model.backbone.layers[1].mixer.A_b_log = nn.Parameter(torch.zeros(3))
    with pytest.raises(UnsupportedError, match=r"found in 'backbone.layers.1' a MambaBlock"):
        trace(model)


def test_backbone_alone_from_example_inputs() -> None:
    model = build("mamba2")

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = model.backbone

        def forward(self, ids: Tensor) -> Tensor:
            return self.backbone(ids, use_cache=False)[0]

    module = Hidden()
    graph = trace(module, tokens(2, 3))
    ids = tokens(2, 11)
    assert len(graph.states) == 6
    assert error(graph(ids)[0], run(module, ids)) < 1e-5


class Averages(nn.Module):
    """Gives the mean of all inputs so far, from a cache of them."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def averages(module: Averages, state: States, x: Tensor) -> Tensor:
    keys, position = x.unsqueeze(2), state["position"]
    state["rows"] = ops.cache_append(state["rows"], keys, position)
    return ops.attention(keys * 0, state["rows"], state["rows"], position).flatten(2)


def test_own_cache() -> None:
    shapes = {"position": (), "rows": (-1, 1, 6)}
    remove = register_adapter(lambda m: isinstance(m, Averages), averages, lambda m: shapes)
    try:
        graph = trace(Averages(), torch.zeros(2, 5, 6))
    finally:
        remove()
    x, outputs, states = torch.randn(3, 9, 6), [], None
    for part in x.split([4, 1, 4], 1):
        y, states = graph(part, states=states)
        outputs.append(y)
    expected = x.cumsum(1) / torch.arange(1, 10)[:, None]
    assert error(torch.cat(outputs, 1), expected) < 1e-6


@pytest.mark.parametrize(
    ("shapes", "inputs", "kind", "message"),
    [
        ({"rows": (-1, 1, 6)}, (2, 5, 6), UsageError, "no adapter names 'position'"),
        ({"rows": (-1, 1, 6), "position": ()}, (2,), UnsupportedError, "no input .batch, length"),
    ],
)
def test_caches_that_cannot_be_counted(
    shapes: Any, inputs: tuple[int, ...], kind: type[Exception], message: str
) -> None:
    remove = register_adapter(
        lambda m: isinstance(m, Averages), lambda m, s, x: x, lambda m: shapes
    )
    try:
        with pytest.raises(kind, match=message):
            trace(Averages(), torch.zeros(inputs))
    finally:
        remove()
