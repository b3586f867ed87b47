"""The values of attention, from v_proj through a cache and attention to o_proj."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from ssmc.core import is_call
from ssmc.core.dialect import operands
from ssmc.passes._follow import is_scaling, source
from ssmc.passes._transformer import ATTENTIONS, Attention, attention_of


@dataclass(frozen=True)
class ValuePath:
    """Two linear layers with attention between them that mixes tokens, but no channels of a head.

    v_proj gives [..., groups * width]; o_proj reads [..., heads * width], in which each group of
    values stands heads / groups times. What v_proj's rows are multiplied with, o_proj's columns can
    take back.
    """

    v_proj: fx.Node
    o_proj: fx.Node
    groups: int
    heads: int
    width: int

    @classmethod
    def of(cls, found: Attention) -> ValuePath:
        """The path through a call of attention; LookupError says why there is none."""
        if found.v_proj is None or found.o_proj is None:
            raise LookupError(f"it has no linear layer for its {_missing(found)}")
        _check_up(found.call, found.v_proj)
        _check_down(found.call, found.o_proj)
        for linear in (found.v_proj, found.o_proj):
            _check_own(linear)
        *_, heads, width = found.call.meta["val"].shape
        groups = operands(found.call)["v"].meta["val"].shape[-2]
        return cls(found.v_proj, found.o_proj, groups, heads, width)

    def by_row(self, columns: Tensor) -> Tensor:
        """[heads / groups, ..., groups * width] of o_proj's columns [..., heads * width].

        Those of a row of v_proj stand in its place, one behind the other in the first dimension.
        """
        shape = (self.groups, self.heads // self.groups, self.width)
        return columns.unflatten(-1, shape).movedim(-2, 0).flatten(-2)

    def by_column(self, rows: Tensor) -> Tensor:
        """[heads * width] of v_proj's rows [groups * width]: for each column of o_proj its row."""
        grouped = rows.view(self.groups, 1, self.width)
        return grouped.expand(-1, self.heads // self.groups, -1).flatten()


def _missing(found: Attention) -> str:
    return "values" if found.v_proj is None else "output"


def values_behind(x: fx.Node) -> ValuePath | None:
    """The path whose o_proj reads `x`, if `x` is what attention gives; LookupError as `of`."""
    call = source(x)
    return ValuePath.of(attention_of(call)) if is_call(call, *ATTENTIONS) else None


def _check_up(call: fx.Node, v_proj: fx.Node) -> None:
    """LookupError unless `call` alone reads v_proj's output, as it is and as its values."""
    given = operands(call)
    reader, value = call, given["v"]
    if value in (given["q"], given["k"]):
        raise LookupError(f"{value.name} is not its values alone")
    while value is not v_proj:
        _check_sole(value, reader)
        if is_call(value, "ssmc::cache_append"):
            cache, x, _ = operands(value).values()
            _check_sole(cache, value)
        elif is_call(value, "unflatten", "to_dtype") or is_scaling(value):
            x = value.all_input_nodes[0]
        else:
            raise LookupError(f"{value.name} stands between {v_proj.name} and it")
        reader, value = value, x
    _check_sole(value, reader)


def _check_down(call: fx.Node, o_proj: fx.Node) -> None:
    """LookupError unless o_proj alone reads the output of `call`, and as it is."""
    value = operands(o_proj)["x"]
    reader = o_proj
    while value is not call:
        _check_sole(value, reader)
        if not (is_call(value, "flatten", "to_dtype") or is_scaling(value)):
            raise LookupError(f"{value.name} stands between it and {o_proj.name}")
        reader, value = value, value.all_input_nodes[0]
    _check_sole(value, reader)


def _check_sole(value: fx.Node, reader: fx.Node) -> None:
    other = next((n for n in value.users if n is not reader and n.op != "output"), None)
    if other is not None:
        raise LookupError(f"{other.name} reads {value.name} as well")


def _check_own(linear: fx.Node) -> None:
    for name in ("weight", "bias"):
        param = operands(linear)[name]
        if param is not None and (param.op != "get_attr" or len(param.users) > 1):
            what = "computed" if param.op != "get_attr" else "tied"
            raise LookupError(f"the {name} of {linear.name} is {what}")
