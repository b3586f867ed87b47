"""Which operator gets which format: patterns over what a graph knows of its operators, as data.

    layer.3:w4a16;out_proj:w4a8;head:float      the command line
    {layer.3: w4a16, out_proj: w4a8}            a recipe; or a list of such, or of the texts

A pattern is a run of dotted parts, each with the wildcards of a shell, of an operator's address
(`layer.3.in_proj`, `head`), of its module's path (`backbone.layers.3.mixer.in_proj`), or its node's
name. Later entries go over earlier ones.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator
from torch import fx

from ssmc.core import Graph, is_call
from ssmc.core.dialect import operands
from ssmc.errors import UsageError, did_you_mean
from ssmc.passes._transformer import LINEARS
from ssmc.passes.ssm_sites import SCANS

FLOAT, DEFAULT = "float", "default"
_BITS = re.compile(r"w([2-8])a(8|16)")
_CALLS = ("ssmc::embedding", "ssmc::causal_conv1d", *LINEARS, *SCANS)


class Bits(NamedTuple):
    """Bits of an operator's weight, and of its inputs (16: bfloat16)."""

    weights: int
    activations: int


@dataclass(frozen=True)
class Override:
    """A pattern and the format of what it matches: `w4a8`, ..., `float`, or `default`."""

    pattern: str
    format: str

    @property
    def bits(self) -> Bits | None:
        """The bits; None for `float` and `default`."""
        found = _BITS.fullmatch(self.format)
        return Bits(int(found[1]), int(found[2])) if found else None

    def __str__(self) -> str:
        return f"{self.pattern}:{self.format}"


@dataclass(frozen=True)
class Operator:
    """A call that can be quantised by itself.

    Its address is `layer.N.ROLE`, or the role where it belongs to no layer; where several calls
    would share it, it is the name of the node.
    """

    node: fx.Node
    address: str
    role: str

    @property
    def layer(self) -> str | None:
        """`layer.N`, or None outside the layers."""
        number = self.node.meta.get("layer")
        return None if number is None else f"layer.{number}"

    @property
    def path(self) -> str:
        """The module it comes from, with its role last."""
        owner = str(self.node.meta.get("owner") or "")
        return owner if owner.rpartition(".")[2] == self.role else f"{owner}.{self.role}".strip(".")

    def matches(self, pattern: str) -> bool:
        """Whether a pattern means this operator."""
        names = (_address(self.node, self.role), self.path, self.node.name)
        return any(_holds(name.split("."), pattern.split(".")) for name in names)


def operators(g: Graph) -> list[Operator]:
    """The operators of a graph that quantise can do, in execution order."""
    calls = [n for n in g.nodes if is_call(n, *_CALLS) and _has_weight(n)]
    roles = {n: str(n.meta.get("role") or "linear") for n in calls}
    times = Counter(_address(n, role) for n, role in roles.items())
    unique = {n: _address(n, r) if times[_address(n, r)] == 1 else n.name for n, r in roles.items()}
    return [Operator(n, unique[n], role) for n, role in roles.items()]


def _has_weight(node: fx.Node) -> bool:
    if not is_call(node, *LINEARS):
        return bool(node.meta.get("role"))  # a convolution outside a site is left alone
    return bool(operands(node)["weight"].op == "get_attr")


def _address(node: fx.Node, role: str) -> str:
    layer = node.meta.get("layer")
    return role if layer is None else f"layer.{layer}.{role}"


def _holds(name: list[str], parts: list[str]) -> bool:
    runs = (name[i : i + len(parts)] for i in range(len(name) - len(parts) + 1))
    return any(all(map(fnmatchcase, run, parts)) for run in runs)


def choose(overrides: Iterable[str], g: Graph) -> dict[fx.Node, Override]:
    """The override that decides for each operator; none for what no pattern matches.

    Raises UsageError for a pattern that matches nothing.
    """
    found = operators(g)
    chosen: dict[fx.Node, Override] = {}
    for override in map(read_override, overrides):
        matched = [o.node for o in found if o.matches(override.pattern)]
        if not matched:
            raise _unmatched(override.pattern, found)
        chosen |= dict.fromkeys(matched, override)
    return chosen


def _unmatched(pattern: str, known: list[Operator]) -> UsageError:
    roles, layers = dict.fromkeys(o.role for o in known), dict.fromkeys(o.layer for o in known)
    names = [*roles, *filter(None, layers), *(o.address for o in known), *(o.path for o in known)]
    hint = (
        did_you_mean(pattern, dict.fromkeys(names))
        or f"there are {', '.join(roles)}; `layer.0`; module paths"
    )
    return UsageError(f"pattern '{pattern}' matches no operator", hint=hint)


def is_format(text: str) -> bool:
    """Whether `text` is wNaM, `float` or `default`."""
    return text in (FLOAT, DEFAULT) or _BITS.fullmatch(text) is not None


def read_override(text: str) -> Override:
    """PATTERN:FORMAT; UsageError for what is neither."""
    pattern, colon, form = (part.strip() for part in text.rpartition(":"))
    override = Override(pattern, form)
    if not (colon and pattern and is_format(form)):
        raise UsageError(
            f"quantise{{overrides}}: '{text}' is not PATTERN:FORMAT",
            hint="as in layer.3:w4a16 or head:float; formats are wNaM (N 2 to 8, M 8 or 16), "
            "float and default",
        )
    return override


def _normalised(given: Any) -> Any:
    """Any spelling as a tuple of texts."""
    if given is None:
        return ()
    if isinstance(given, str):
        return tuple(part.strip() for part in given.split(";") if part.strip())
    if isinstance(given, Mapping):
        return tuple(f"{pattern}:{form}" for pattern, form in given.items())
    if isinstance(given, list | tuple):
        return tuple(text for item in given for text in _normalised(item))
    raise ValueError("neither text, a mapping of patterns to formats, nor a list of them")


Overrides = Annotated[tuple[str, ...], BeforeValidator(_normalised)]
"""Overrides in order, `PATTERN:FORMAT` each."""
