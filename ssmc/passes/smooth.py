"""Move the outliers of activations into the weights, channel by channel, exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ssmc.core import Context, Graph, Pass, is_call, register
from ssmc.core.dialect import operands
from ssmc.errors import UsageError
from ssmc.passes._calibration import observe
from ssmc.passes._follow import base_of, read_by, source
from ssmc.passes._rows import Rows
from ssmc.passes._transformer import LINEARS, gated_mlp
from ssmc.passes._values import values_behind
from ssmc.passes.linears import Linear
from ssmc.passes.ssm_sites import NORMS
from ssmc.quant.observers import Absmax


@register
@dataclass(frozen=True)
class Smooth(Pass):
    """Divide each input channel of a linear layer by a factor its weight is multiplied with.

    Replaces:  linear(x, W)
    With:      linear(x / s, W * s),  s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)

    SmoothQuant (Xiao et al. 2023, arXiv 2211.10438), equation 4. The division is folded into
    what produces x, where that is legal: a norm's weight (in_proj, head, and out_proj behind a
    gated norm), the rows of x_proj (dt_proj), those of up_proj (down_proj), by which the gate is
    multiplied, or those of v_proj (o_proj), where the heads that read a group of values share its
    factors. It is not across a SiLU, or where both factors of a product are computed otherwise.
    """

    name = "smooth"
    stage = "rewrite"
    after = ("fold-norm", "hadamard")
    needs = ("ssm-sites", "linears")
    exact_to = 1e-5
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"smooth{{alpha={self.alpha}}}: alpha must lie between 0 and 1")

    def run(self, g: Graph, context: Context) -> None:
        """Group the layers by their input, measure, and fold."""
        groups = {x: ls for x, ls in by_input(g.facts["linears"]).items() if self._legal(g, x, ls)}
        observers = {x: Absmax() for x in groups}
        observe(g, observers, context)
        for x, linears in groups.items():
            weights = [g.param(linear.weight) for linear in linears]
            read = [w * base_of(of.input)[1] for w, of in zip(weights, linears, strict=True)]
            width = weights[0].shape[-1]
            absmax = observers[x].channel().reshape(-1, width).amax(0)  # over a token's experts
            path = values_behind(x)
            if path is None:
                s = factors(absmax, read, self.alpha)
                divide(g, x, s)
            else:
                rows = [path.by_row(weight) for weight in read]
                shared = factors(path.by_row(absmax).amax(0), rows, self.alpha)
                divide_rows(g, Rows(path.v_proj, 0, len(shared)), shared)
                s = path.by_column(shared)
            for linear, weight in zip(linears, weights, strict=True):
                g.set_param(linear.weight, weight * s)
                g.match(linear.node)

    def _legal(self, g: Graph, x: fx.Node, linears: list[Linear]) -> bool:
        tied = next((linear for linear in linears if linear.tied), None)
        if tied is not None:
            g.skip(tied.node, f"its weight is tied: {tied.weight.target}")
        elif set(read_by(x)) != {linear.node for linear in linears}:
            g.skip(linears[0].node, "its input has another reader")
        else:
            reason = _unfit(x)
            if reason is None:
                return True
            g.skip(linears[0].node, f"{source(x).name}, which computes its input, {reason}")
        return False


def _unfit(x: fx.Node) -> str | None:
    """Why what computes `x` cannot divide it; None where it can."""
    try:
        path = values_behind(x)
    except LookupError as error:
        return f"cannot take a factor: {error.args[0]}"
    return None if path or _has_weight(x) or _rows(x) else "cannot take a factor"


def by_input(linears: list[Linear]) -> dict[fx.Node, list[Linear]]:
    """The linear layers that read each value, or a multiple of it by a number."""
    groups: dict[fx.Node, list[Linear]] = {}
    for linear in linears:
        groups.setdefault(base_of(linear.input)[0], []).append(linear)
    return groups


def factors(absmax: torch.Tensor, weights: list[torch.Tensor], alpha: float) -> torch.Tensor:
    """SmoothQuant's factors [K], from the input's range [K] and the weights [..., K] it meets."""
    largest = torch.stack([w.abs().flatten(0, -2).amax(0) for w in weights]).amax(0)
    s = absmax.clamp_min(1e-5).pow(alpha) / largest.clamp_min(1e-5).pow(1 - alpha)
    return s.clamp_min(1e-5)


def divide(g: Graph, x: fx.Node, s: torch.Tensor) -> None:
    """Make what computes `x` give `x / s` instead."""
    rows = _rows(x)
    if rows is not None:
        divide_rows(g, rows, s)
        return
    gamma = operands(x)["weight"]
    value = (1 if gamma is None else g.param(gamma)) / s
    _set(g, x, "weight", value)
    bias = operands(x).get("bias")
    if bias is not None:
        _set(g, x, "bias", g.param(bias) / s)


def divide_rows(g: Graph, rows: Rows, s: torch.Tensor) -> None:
    """Make a linear layer give the outputs of these rows divided by s [stop - start]."""
    given = operands(rows.linear)
    for param, by in ((given["weight"], s[:, None]), (given.get("bias"), s)):
        if param is not None:
            scaled = g.param(param).clone()
            scaled.narrow(-by.dim(), rows.start, len(s)).div_(by)
            g.set_param(param, scaled)


def _set(g: Graph, x: fx.Node, name: str, value: torch.Tensor) -> None:
    """Give a norm a parameter, its own where it had one that another shares."""
    param = operands(x)[name]
    if param is not None and len(param.users) == 1:
        g.set_param(param, value)
    else:
        own = g.new_param(f"{x.meta['owner']}.{name}", value)
        x.args = tuple((operands(x) | {name: own}).values())


def _has_weight(x: fx.Node) -> bool:
    """Whether `x` is a norm whose weight and bias can be set: parameters, or none so far."""
    if not is_call(x, *NORMS):
        return False
    given = (operands(x).get(name) for name in ("weight", "bias"))
    return all(param is None or param.op == "get_attr" for param in given)


def _rows(x: fx.Node) -> Rows | None:
    """The rows that compute `x`: a part of a linear layer's output, read once.

    Or the factor of `x` that a linear layer computes, where `x` is the product of a gated MLP.
    """
    mlp = gated_mlp(x) if is_call(x, "mul") else None
    if mlp is not None:
        return _rows(mlp.up) if is_call(mlp.up, "getitem") else _all_rows(mlp.up)
    if not is_call(x, "getitem"):
        return None
    parts, index = operands(x).values()
    if not is_call(parts, "split") or sum(user.args[1] == index for user in parts.users) > 1:
        return None
    linear, sizes, dim = operands(parts).values()
    if dim != -1 or _all_rows(linear) is None:
        return None
    start = sum(sizes[:index])
    return Rows(linear, start, start + sizes[index])


def _all_rows(linear: fx.Node) -> Rows | None:
    """The rows of a linear layer whose output is read once, and whose parameters are its own."""
    if not is_call(linear, *LINEARS) or len(linear.users) > 1:
        return None
    given = operands(linear)
    params = [p for p in (given["weight"], given.get("bias")) if p is not None]
    if any(p.op != "get_attr" or len(p.users) > 1 for p in params):
        return None
    return Rows(linear, 0, given["weight"].meta["val"].shape[-2])
