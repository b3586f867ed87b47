import operator

import pytest
import torch
from torch import Tensor, nn

from ssmc import ops
from ssmc.errors import UsageError

from .samples import Sample, samples

SAMPLES = samples()
IDS = [f"{name}-{index}" for index, (name, _) in enumerate(SAMPLES)]


def overload(name: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.ssmc, name).default


def leaves(result: Tensor | tuple[Tensor, ...]) -> list[tuple[torch.Size, torch.dtype]]:
    tensors = (result,) if isinstance(result, Tensor) else result
    return [(tensor.shape, tensor.dtype) for tensor in tensors]


def test_every_exported_operator_has_a_sample() -> None:
    assert {name for name, _ in SAMPLES} == set(ops.__all__)


@pytest.mark.parametrize(("name", "args"), SAMPLES, ids=IDS)
def test_opcheck(name: str, args: Sample) -> None:
    torch.library.opcheck(overload(name), args)


@pytest.mark.parametrize(("name", "args"), SAMPLES, ids=IDS)
def test_meta_device_agrees_in_shape_and_type(name: str, args: Sample) -> None:
    on_meta = [arg.to("meta") if isinstance(arg, Tensor) else arg for arg in args]
    fake = overload(name)(*on_meta)
    assert leaves(fake) == leaves(overload(name)(*args))
    assert all(tensor.is_meta for tensor in ((fake,) if isinstance(fake, Tensor) else fake))


@pytest.mark.parametrize(("name", "args"), SAMPLES, ids=IDS)
def test_operands_are_left_as_they_were(name: str, args: Sample) -> None:
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    before = [tensor.clone() for tensor in tensors]
    overload(name)(*args)
    assert all(torch.equal(*pair) for pair in zip(before, tensors, strict=True))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.taps = nn.Parameter(torch.randn(6, 3))
        self.decay = nn.Parameter(-torch.rand(6, 6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = ops.linear(x, self.weight)
        y, history = ops.causal_conv1d(x, weight=self.taps, activation="silu")
        y, _ = ops.selective_scan(y, x, self.decay, y, y, reverse=True)
        return ops.rms_norm(y), history


class Unpacked(Block):
    """Indexes instead of unpacking, which plain symbolic tracing cannot do."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = ops.linear(x, self.weight)
        conv = ops.causal_conv1d(x, weight=self.taps, activation="silu")
        scan = ops.selective_scan(conv[0], x, self.decay, conv[0], conv[0], reverse=True)
        return ops.rms_norm(scan[0]), conv[1]


def test_a_traced_call_is_one_node_with_all_arguments_in_place() -> None:
    graph = torch.fx.symbolic_trace(Unpacked()).graph
    calls = [n for n in graph.nodes if n.op == "call_function" and n.target != operator.getitem]
    assert [n.target for n in calls] == [
        overload(name) for name in ("linear", "causal_conv1d", "selective_scan", "rms_norm")
    ]
    assert all(len(n.args) == len(n.target._schema.arguments) and not n.kwargs for n in calls)
    assert calls[1].args[2:] == (None, None, "silu", False)
    assert calls[3].args[1:] == (None, 1e-5)


@torch.no_grad()
def test_export_with_dynamic_batch_and_length() -> None:
    block = Block()
    dynamic = torch.export.Dim.DYNAMIC
    example = torch.randn(2, 9, 6)
    program = torch.export.export(block, (example,), dynamic_shapes=({0: dynamic, 1: dynamic},))
    for shape in ((2, 9, 6), (3, 2, 6), (5, 70, 6)):
        x = torch.randn(shape)
        for actual, expected in zip(program.module()(x), block(x), strict=True):
            assert torch.equal(actual, expected)


def test_unknown_keyword_and_missing_argument_are_type_errors() -> None:
    with pytest.raises(TypeError, match="wieght"):
        ops.rms_norm(torch.ones(3), wieght=None)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="weight"):
        ops.linear(torch.ones(3))  # type: ignore[call-arg]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wrong_shape_names_operator_operand_and_both_shapes(device: str) -> None:
    x = torch.ones(2, 5, 6, device=device)
    with pytest.raises(UsageError, match=r"causal_conv1d: weight has shape \[6, 1, 4\]") as raised:
        ops.causal_conv1d(x, torch.ones(6, 1, 4, device=device))
    assert "expected [6, 4]" in str(raised.value)
    with pytest.raises(UsageError, match=r"linear: weight has shape \[3, 7\], expected \[3, 6\]"):
        ops.linear(x, torch.ones(3, 7, device=device))
    A, B = torch.ones(6, 3, device=device), torch.ones(2, 5, 3, device=device)
    with pytest.raises(UsageError, match="selective_scan: C has shape"):
        ops.selective_scan(x, x, A, B, B[:, :4])
    heads = x.unflatten(-1, (2, 3))
    with pytest.raises(UsageError, match="ssd_scan: A has shape"):
        ops.ssd_scan(heads, x[..., :2], A[:, 0], heads, heads)
