"""Fold the weight of a norm into the linear layers that read it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor, fx

from ssmc.core import Context, Graph, Pass, is_call, register
from ssmc.core.dialect import operands, target_name
from ssmc.passes._follow import read_by
from ssmc.passes._shared import part
from ssmc.passes._transformer import LINEARS
from ssmc.passes.linears import PLAIN_NORMS


@register
@dataclass(frozen=True)
class FoldNorm(Pass):
    """Move each norm's weight into the columns of the linear layers behind it, and its bias.

    Replaces:  linear(rms_norm(x, gamma), W)
               linear(layer_norm(x, gamma, beta), W, b)
    With:      linear(rms_norm(x), W * gamma)
               linear(layer_norm(x), W * gamma, b + W beta)

    A norm without a weight commutes with an orthogonal rotation, which rotating the residual
    stream needs (QuaRot, Ashkboos et al. 2024, section 4, after SliceGPT). Linear layers that share
    a weight behind norms of equal factors go on sharing it; behind others they get their own. What
    an embedding shares stays as it is.
    """

    name = "fold-norm"
    stage = "rewrite"
    needs = ("ssm-sites", "linears")
    exact_to = 1e-5

    def run(self, g: Graph, context: Context) -> None:
        """Scale the columns of every reader's weight; leave the norm where a reader cannot."""
        folding = []
        for norm in [n for n in g.nodes if is_call(n, *PLAIN_NORMS) and _given(n)]:
            reason = _unfit(norm)
            if reason is None:
                folding.append(g.match(norm))
            else:
                g.skip(norm, reason)
        fold_norms(g, folding)


def _given(norm: fx.Node) -> dict[str, fx.Node]:
    """The weight and the bias of a norm, those it has."""
    found = {name: operands(norm).get(name) for name in ("weight", "bias")}
    return {name: param for name, param in found.items() if param is not None}


def _unfit(norm: fx.Node) -> str | None:
    """Why a norm has to keep its weight and bias; None where all its readers can take them over."""
    computed = next((p for p in _given(norm).values() if p.op != "get_attr"), None)
    if computed is not None:
        return f"its weight is computed, by {computed.name}"
    reasons = (_unfit_reader(user, norm) for user in read_by(norm))
    return next((reason for reason in reasons if reason), None)


def _unfit_reader(user: fx.Node, norm: fx.Node) -> str | None:
    if not is_call(user, *LINEARS):
        return f"{user.name}, which reads it, is no linear layer"
    weight = operands(user)["weight"]
    if weight.op != "get_attr":
        return f"the weight of {user.name} is computed, by {weight.name}"
    if not all(is_call(n, *LINEARS) for n in weight.users):
        return f"the weight of {user.name} is tied: {weight.target}"
    if "bias" not in _given(norm):
        return None
    if not is_call(user, "ssmc::linear") or user not in norm.users:
        return f"{user.name} reads a multiple of it or has no bias, so its own bias has no place"
    bias = operands(user)["bias"]
    if bias is not None and (bias.op != "get_attr" or not _is_of(weight, bias)):
        return f"the bias of {user.name} is computed or tied"
    return None


def _is_of(weight: fx.Node, bias: fx.Node) -> bool:
    """Whether all that reads a bias reads this weight as well."""
    return all(is_call(n, "ssmc::linear") and operands(n)["weight"] is weight for n in bias.users)


def fold_norms(g: Graph, norms: list[fx.Node]) -> list[fx.Node]:
    """The same norms without weights and biases, which the linear layers that read them take over.

    Layers that share a weight go on sharing it where their norms have equal factors. All that reads
    one of the norms has to be a linear layer whose weight is a parameter.
    """
    behind = {layer: norm for norm in norms if _given(norm) for layer in read_by(norm)}
    factors = {layer: _factors(g, norm) for layer, norm in behind.items()}
    part(g, factors)
    moved = {layer: key for layer, key in factors.items() if "bias" in _given(behind[layer])}
    part(g, moved, "bias")
    _add_biases(g, behind)
    weights = {operands(layer)["weight"]: norm for layer, norm in behind.items()}
    for weight, norm in weights.items():
        if "weight" in _given(norm):
            g.set_param(weight, g.param(weight) * g.param(_given(norm)["weight"]))
    return [_without_factors(g, norm) for norm in norms]


def _factors(g: Graph, norm: fx.Node) -> Hashable:
    """The values of a norm's weight and bias: equal for norms that fold alike."""
    return tuple((name, *g.param(p).tolist()) for name, p in _given(norm).items())


def _add_biases(g: Graph, behind: dict[fx.Node, fx.Node]) -> None:
    """Add W beta to the biases of linear layers, by the norm that each stands behind."""
    done: dict[tuple[fx.Node, fx.Node | None], fx.Node] = {}
    for layer, norm in behind.items():
        if "bias" not in _given(norm):
            continue
        weight, bias = operands(layer)["weight"], operands(layer)["bias"]
        if (weight, bias) not in done:
            value = g.param(weight) @ g.param(_given(norm)["bias"])
            done[weight, bias] = _plus(g, layer, bias, value)
        layer.args = tuple((operands(layer) | {"bias": done[weight, bias]}).values())


def _plus(g: Graph, layer: fx.Node, bias: fx.Node | None, value: Tensor) -> fx.Node:
    if bias is None:
        return g.new_param(f"{layer.meta['owner']}.bias", value)
    return g.set_param(bias, g.param(bias) + value)


def _without_factors(g: Graph, norm: fx.Node) -> fx.Node:
    if not _given(norm):
        return norm
    kept = operands(norm) | dict.fromkeys(_given(norm))
    with g.before(norm):
        plain = g.call(target_name(norm.target), *kept.values(), like=norm)
    plain.meta["role"] = norm.meta.get("role")
    g.replace(norm, plain)
    return plain
