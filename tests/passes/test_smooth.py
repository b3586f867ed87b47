"""SmoothQuant's factors: what they are, where they go, what they are good for."""

from __future__ import annotations

import pytest
import torch
from core.tiny import KINDS, apply, error, graph, logits, toy_context, values
from torch import Tensor, nn

from ssmc import ops
from ssmc.core import Graph
from ssmc.frontend import trace
from ssmc.passes.smooth import by_input, factors

from .quantised import input_error, raw_value


def _inputs(g: Graph, role: str) -> list[str]:
    """The names of the inputs of the layers of one role (after an analysis)."""
    return [n.args[0].name for n in g.calls("ssmc::linear") if n.meta["role"] == role]  # type: ignore[union-attr]


def _equation_4(x: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)."""
    largest = x.flatten(0, -2).abs().amax(0)
    return largest**alpha / weight.abs().amax(0) ** (1 - alpha)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_in_proj_of_mamba(alpha: float) -> None:
    g = graph("mamba")
    apply(g, "linears")
    params, names = g.params(), _inputs(g, "in_proj")
    before, expected = values(g, *names), logits(g)
    apply(g, f"smooth{{alpha={alpha}}}")
    after = values(g, *names)
    for i, name in enumerate(names):
        weight = params[f"backbone.layers.{i}.mixer.in_proj.weight"]
        gamma = params[f"backbone.layers.{i}.norm.weight"]
        s = _equation_4(before[name], weight, alpha)
        changed = g.params()
        assert error(changed[f"backbone.layers.{i}.mixer.in_proj.weight"], weight * s) < 1e-6
        assert error(changed[f"backbone.layers.{i}.norm.weight"], gamma / s) < 1e-6
        assert error(after[name], before[name] / s) < 1e-5
    assert error(logits(g), expected) < 2e-6


def test_dt_proj_divides_the_rows_of_x_proj() -> None:
    g = graph("mamba")
    apply(g, "linears")
    params, (name, _) = g.params(), _inputs(g, "dt_proj")
    before = values(g, name)[name]
    apply(g, "smooth")
    mixer = "backbone.layers.0.mixer"
    weight, rows = params[f"{mixer}.dt_proj.weight"], params[f"{mixer}.x_proj.weight"]
    rank = weight.shape[1]
    s = _equation_4(before, weight, 0.5)
    assert error(g.params()[f"{mixer}.dt_proj.weight"], weight * s) < 1e-6
    assert error(g.params()[f"{mixer}.x_proj.weight"][:rank], rows[:rank] / s[:, None]) < 1e-6
    assert torch.equal(g.params()[f"{mixer}.x_proj.weight"][rank:], rows[rank:])


PLACES = {
    "mamba": {"in_proj": 2, "dt_proj": 2},
    "mamba2": {"in_proj": 2, "out_proj": 2, "head": 1},
}
REASONS = {
    "mamba": [
        *["its input has another reader", "which computes its input, cannot take a factor"] * 2,
        "its weight is tied: backbone.embeddings.weight",
    ],
    "mamba2": [],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", ["", "fold-norm,"])
def test_legal_places(kind: str, first: str) -> None:
    g = graph(kind)
    expected = logits(g)
    record = apply(g, f"{first}smooth")["smooth"]
    roles = [g.node(name).meta["role"] for name in record.matched]
    assert {role: roles.count(role) for role in roles} == PLACES[kind]
    reasons = [s["reason"].rpartition("scan, ")[2] for s in record.skipped]
    assert sorted(reasons) == sorted(REASONS[kind])
    assert error(logits(g), expected) < 3e-6
    assert record.error is not None
    assert record.error < 1e-5


def test_out_proj_of_mamba_behind_a_rotation_is_left() -> None:
    g = graph("mamba2")
    record = apply(g, "hadamard,smooth")["smooth"]
    assert {s["node"] for s in record.skipped} == {
        f"backbone_layers_{i}_mixer_out_proj" for i in range(2)
    }


class Sharing(nn.Module):
    """Two norms over one weight, a value that two layers read, and parts that must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(6) + 0.5)
        self.weight = nn.Parameter(torch.rand(6))
        self.q, self.k, self.last, self.sizes = (nn.Linear(6, 6, bias=False) for _ in range(4))
        self.small = nn.Linear(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = ops.rms_norm(x, self.gamma)
        x = x + self.q(y) * self.k(y)
        x = x + self.last(ops.rms_norm(x, self.gamma)) * self.weight
        low, rest = torch.split(self.sizes(ops.rms_norm(x, None)), [2, 4], -1)
        again, _ = torch.split(self.sizes(x), [2, 4], -1)
        return self.small(low) + self.small(again) + rest.sum()


def test_sharing_is_respected() -> None:
    g = trace(Sharing(), torch.zeros(2, 5, 6))
    context = toy_context()
    (x,) = context.calibration[0]
    expected, params = g(x)[0], g.params()
    record = apply(g, "smooth", context)["smooth"]
    assert error(g(x)[0], expected) < 2e-6
    assert record.matched == ["q", "k", "last"]
    assert torch.equal(g.params()["weight"], params["weight"])
    gammas = [n.args[1] for n in g.calls("ssmc::rms_norm")][:2]
    assert gammas[0] is not gammas[1]
    largest = torch.stack([params[f"{name}.weight"].abs().amax(0) for name in "qk"]).amax(0)
    normed = torch.cat([ops.rms_norm(b, params["gamma"]) for (b,) in context.calibration])
    s = normed.flatten(0, 1).abs().amax(0).sqrt() / largest.sqrt()
    assert error(g.params()["q.weight"], params["q.weight"] * s) < 1e-6
    assert error(g.params()["k.weight"], params["k.weight"] * s) < 1e-6


def test_factors_of_silent_channels_are_finite() -> None:
    s = factors(torch.tensor([0.0, 1.0]), [torch.tensor([[1.0, 0.0]])], 0.5)
    assert torch.isfinite(s).all()
    assert (s > 0).all()


def test_layers_are_grouped_by_input() -> None:
    g = trace(Sharing(), torch.zeros(2, 5, 6))
    apply(g, "linears", toy_context())
    groups = by_input(g.facts["linears"])
    assert [linear.node.name for linear in next(iter(groups.values()))] == ["q", "k"]


def _plant(g: Graph) -> None:
    """Channel 3 of the residual stream is large for every token, and read by small weights."""
    for node in [n for n in g.nodes if n.op == "get_attr"]:
        value = g.param(node).clone()
        if node.target == "backbone.embeddings.weight":
            value[:, 3] = 10 * value[:, 3].sign()
            g.set_param(node, value)
        elif str(node.target).endswith("in_proj.weight"):
            value[:, 3] /= 100
            g.set_param(node, value)


def test_smoothing_tames_an_outlier_of_the_in_proj_input() -> None:
    spreads, local, whole = {}, {}, {}
    for passes in ("", "smooth,"):
        g = graph("mamba2")  # its head is untied, so that planting leaves it as it is
        _plant(g)
        options = "{granularity=tensor,embedding=false}"
        records = apply(g, f"fold-norm,{passes}quantise{options}")
        (in_proj, _) = [n for n in g.calls("ssmc::linear") if n.meta["role"] == "in_proj"]
        raw = raw_value(in_proj.args[0])
        largest = values(g, raw.name)[raw.name].flatten(0, -2).abs().amax(0)
        spreads[passes] = (largest.max() / largest.median()).item()
        local[passes] = input_error(g, in_proj)
        whole[passes] = records["quantise"].error or 0
    assert spreads["smooth,"] < spreads[""] / 5, spreads
    assert local["smooth,"] < local[""] / 3, local
    assert whole["smooth,"] < whole[""] / 1.5, whole


class Multiples(nn.Module):
    """Two layers that read multiples of one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(6)
        self.a, self.b = (nn.Linear(6, 6, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.a(y * 1.5) + self.b(0.25 * y / 2.0)


def test_multiples_by_numbers_are_seen_through() -> None:
    context, module = toy_context(), Multiples()
    g = trace(module, torch.zeros(2, 5, 6))
    (x,) = context.calibration[0]
    expected, params = g(x)[0], g.params()
    record = apply(g, "smooth", context)["smooth"]
    assert record.matched == ["a", "b"]
    assert error(g(x)[0], expected) < 2e-6
    weights = [params["a.weight"] * 1.5, params["b.weight"] * 0.125]
    normed = torch.cat([module.norm(batch) for (batch,) in context.calibration])
    s = factors(normed.flatten(0, 1).abs().amax(0), weights, 0.5)
    for name in "ab":
        assert error(g.params()[f"{name}.weight"], params[f"{name}.weight"] * s) < 1e-6
    assert error(g.params()["norm.weight"], params["norm.weight"] / s) < 1e-6


def test_a_multiple_that_something_else_reads_is_left() -> None:
    class Third(Multiples):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.tanh(self.norm(x) * 2.0)

    g = trace(Third(), torch.zeros(2, 5, 6))
    y, again = g.calls("ssmc::rms_norm")
    g.replace(again, y)
    record = apply(g, "smooth", toy_context())["smooth"]
    assert record.matched == []
    assert record.skipped == [{"node": "a", "reason": "its input has another reader"}]
