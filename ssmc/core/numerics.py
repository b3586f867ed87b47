"""Signal-to-noise of a graph against another that has the same node names, value by value."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import fx

from ssmc.core.graph import Graph, check_finite, is_call
from ssmc.core.pipeline import signal_to_noise
from ssmc.core.walk import Leaf

EQUAL = 300.0  # dB: what is reported for equal values, whose ratio is infinite
Inputs = tuple[torch.Tensor, ...]
PARTS = {
    role: f"{role} out"
    for role in ("conv1d", "scan", "out_proj", "attention", "o_proj", "down_proj")
}


def compare_values(g: Graph, reference: Graph, names: set[str], inputs: Inputs) -> dict[str, float]:
    """The signal-to-noise ratio (dB) of each named value of `g` on `inputs`.

    Raises NumericsError naming the first of them that holds NaN or infinity.
    """
    return _ratios(g, _values(reference, names, inputs), inputs)


def _values(g: Graph, names: Container[str] | None, inputs: Inputs) -> dict[str, Any]:
    """The values of calls (of those named), on the host, or in files where that is short, too."""
    values: dict[str, Any] = {}

    def keep(node: fx.Node, value: Any) -> None:
        if node.op == "call_function" and (names is None or node.name in names):
            values[node.name] = fx.node.map_aggregate(
                value, lambda v: g.keep(v.cpu()) if isinstance(v, torch.Tensor) else v
            )

    g.watch(keep, *inputs)
    return values


def _ratios(g: Graph, expected: Mapping[str, Any], inputs: Inputs) -> dict[str, float]:
    """As `compare_values`, with the values expected."""
    found: dict[str, float] = {}

    def compare(node: fx.Node, value: Any) -> None:
        if node.name in expected and _is_float(value) and _is_float(expected[node.name]):
            check_finite(node, first_result(value))
            ratio = signal_to_noise(first_result(value), first_result(expected[node.name]))
            found[node.name] = ratio if math.isfinite(ratio) else EQUAL

    g.watch(compare, *inputs)
    return found


def _is_float(value: Any) -> bool:
    first = first_result(value)
    return isinstance(first, torch.Tensor) and first.is_floating_point()


def block_numerics(g: Graph, reference: Graph, inputs: Inputs) -> list[dict[str, Any]]:
    """A row a block, worst first: signal-to-noise (dB) of its output and of its parts.

    `output` is the residual stream behind the block; the parts are named by role. Experts are left
    out: what two graphs put out where a token has other experts does not compare.
    """
    outputs = _block_outputs(reference)
    parts = {
        n.name: n
        for n in reference.nodes
        if n.meta.get("role") in PARTS and not is_call(n, "ssmc::expert_linear")
    }
    ratios = compare_values(g, reference, set(outputs.values()) | set(parts), inputs)
    rows = []
    for layer, name in outputs.items():
        row: dict[str, Any] = {"block": layer, "output": ratios[name]}
        row |= {
            PARTS[n.meta["role"]]: ratios[n.name]
            for n in parts.values()
            if n.meta.get("layer") == layer
        }
        rows.append(row)
    return sorted(rows, key=lambda row: row["output"])


def operator_numerics(
    g: Graph, reference: Graph, operators: Mapping[str, str], inputs: Inputs
) -> list[dict[str, Any]]:
    """A row an operator (node name and address), the worst first: signal-to-noise in dB.

    `own` is that of its output where its inputs are those of `reference`, rounded as in `g`: what
    quantising this operator adds. `output` is that with all errors that came before as well.
    """
    exact = _values(reference, None, inputs)
    found = _ratios(g, {name: exact[name] for name in operators}, inputs)
    leaf = g.leaves(inputs)
    rows = []
    for name, address in operators.items():
        alone = _alone(g.node(name), exact, leaf, inputs[0].device)
        ratio = signal_to_noise(first_result(alone), first_result(exact[name]))
        own = ratio if math.isfinite(ratio) else EQUAL
        rows.append({"operator": address, "own": own, "output": found[name]})
    return sorted(rows, key=lambda row: row["own"])


def _alone(node: fx.Node, exact: Mapping[str, Any], leaf: Leaf, device: torch.device) -> Any:
    """The value of a call, made of values that are exact where the reference has them."""

    def value(operand: fx.Node) -> Any:
        if operand.op != "call_function":
            return leaf(operand)
        if operand.name not in exact:
            return _alone(operand, exact, leaf, device)
        return fx.node.map_aggregate(
            exact[operand.name], lambda v: v.to(device) if isinstance(v, torch.Tensor) else v
        )

    args, kwargs = fx.map_arg((node.args, node.kwargs), value)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def first_result(value: Any) -> torch.Tensor:
    """The first of several results, or the only one."""
    first: torch.Tensor = value[0] if isinstance(value, tuple | list) else value
    return first


def _block_outputs(g: Graph) -> dict[int, str]:
    adds = [n for n in g.nodes if is_call(n, "add") and n.meta.get("layer") is not None]
    return {n.meta["layer"]: n.name for n in adds}
