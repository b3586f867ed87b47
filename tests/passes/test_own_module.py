"""Anyone's own module through the passes, without states and with odd structure."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from core.tiny import error
from torch import Tensor, nn

import ssmc
from ssmc import ops
from ssmc.core import is_call
from ssmc.errors import NumericsError

PASSES = "hadamard,smooth,percentile{p=0.999}"


class Layer(nn.Module):
    """A selective scan in one direction or, with shared convolution and projections, in both."""

    def __init__(self, width: int = 12, rank: int = 4, both: bool = False) -> None:
        super().__init__()
        self.width, self.rank, self.both = width, rank, both
        self.inputs = nn.Linear(width, width)
        self.conv = nn.Conv1d(width, width, 3, groups=width)
        self.select = nn.Linear(width, width + 2 * rank, bias=False)
        self.A_log = nn.Parameter(torch.rand(width, rank))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        u = self.inputs(ops.rms_norm(x, None))
        u, _ = ops.causal_conv1d(u, self.conv.weight.squeeze(1), self.conv.bias, activation="silu")
        dt, B, C = torch.split(self.select(u), [self.width, self.rank, self.rank], dim=-1)
        y, _ = ops.selective_scan(u, dt, -torch.exp(self.A_log), B, C)
        if self.both:
            back, _ = ops.selective_scan(u, dt, -torch.exp(self.A_log), B, C, reverse=True)
            return self.out(y) + self.out(back) + x
        return self.out(y) + x


class Classifier(nn.Module):
    """The layer on every step, its sum over the length, and one class a sequence."""

    def __init__(self, both: bool = False) -> None:
        super().__init__()
        self.layer, self.classes = Layer(both=both), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classes(ops.rms_norm(self.layer(x).mean(1), None))


class Shared(nn.Module):
    """One projection on the inputs of two scans, whose scales differ, and on a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.select = nn.Linear(12, 4, bias=False)
        self.A = nn.Parameter(-torch.rand(12, 4))

    def forward(self, x: Tensor) -> Tensor:
        for factor in (1.0, 30.0):
            u = F.silu(x * factor)
            B = self.select(u)
            y, _ = ops.selective_scan(u, u, self.A, B, B)
            x = x + ops.rms_norm(y, None)
        return x + self.select(ops.rms_norm(x, None)).sum(-1, keepdim=True)


MODULES = {
    "one way": lambda: Layer(),
    "both ways": lambda: Layer(both=True),
    "classifier": lambda: Classifier(),
    "classifier both ways": lambda: Classifier(both=True),
    "shared": lambda: Shared(),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("granularity", ["free", "tensor"])
def test_compiles_on_tensors(name: str, granularity: str) -> None:
    module = MODULES[name]()
    state = {key: value.clone() for key, value in module.state_dict().items()}
    compiled = ssmc.compile(
        module,
        (torch.zeros(2, 5, 12),),
        passes=f"{PASSES},quantise{{granularity={granularity}}}",
        calibration=torch.randn(20, 9, 12),
    )
    assert compiled.graph.states == ()
    x = torch.randn(3, 9, 12)
    with torch.no_grad():
        expected = module(x)
    for execution in ("simulated", "lowered"):
        compiled.execution = execution  # type: ignore[assignment]
        assert 1e-5 < error(compiled(x)[0], expected) < (0.06 if granularity == "free" else 0.12)
    linears = compiled.graph.calls("ssmc::linear")
    assert len(linears) >= 2
    assert compiled.report["passes"][-1]["skipped"] == []
    assert all(is_call(n.args[i], "ssmc::dequantize") for n in linears for i in (0, 1))
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())


def test_a_shared_weight_is_folded_for_each_reader() -> None:
    compiled = ssmc.compile(
        Shared(),
        (torch.zeros(2, 5, 12),),
        passes="absmax",
        calibration=torch.randn(8, 9, 12),
    )
    g = compiled.graph
    first, second, third = (n.args[1].args for n in g.calls("ssmc::linear"))  # type: ignore[union-attr]
    assert len({first[0], second[0], third[0]}) == 3
    assert g.params()["select.weight_int8"].abs().max() == 127
    assert not torch.equal(g.param(first[1]), g.param(second[1]))  # type: ignore[arg-type]


def test_smooth_gives_a_norm_in_the_root_module_a_weight() -> None:
    compiled = ssmc.compile(
        Layer(),
        (torch.zeros(2, 5, 12),),
        passes="smooth",
        scheme="none",
        calibration=torch.randn(8, 9, 12),
    )
    assert compiled.graph.params()["weight"].shape == (12,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_weight_is_named(bad: float) -> None:
    module = Classifier()
    module.layer.A_log.data[3, 1] = bad
    with pytest.raises(NumericsError, match=r"tensor 'layer\.A_log' holds NaN or infinity"):
        ssmc.compile(module, (torch.zeros(2, 5, 12),), calibration=torch.randn(8, 9, 12))


def test_bad_calibration_value_is_named() -> None:
    calibration = torch.randn(20, 9, 12)
    calibration[17, 3, 5] = float("nan")
    with pytest.raises(NumericsError, match=r"node '[a-z_0-9]+' holds NaN or infinity"):
        ssmc.compile(Layer(), (torch.zeros(2, 5, 12),), calibration=calibration)
