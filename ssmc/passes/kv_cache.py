"""Keep the keys and values of attention in 8 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ssmc.core import Context, Graph, Pass, is_call, register
from ssmc.core.dialect import operands


@register
@dataclass(frozen=True)
class KvCache(Pass):
    """Hold keys and values as int8, with a scale for each token and head.

    Replaces:  attention(q, append(k_cache, k), append(v_cache, v))
    With:      attention(q, dequantize(append(cache, k_int8), append(scales, k_scale)), ...)

    Scales are made from the key or value itself when it is appended, so nothing is calibrated, and
    a row is never rounded twice. Integers and scales (bfloat16) are states of the graph: of heads
    of P channels, P + 2 bytes a token instead of 4 P. Queries, and what attention computes, stay
    in float32. Per token and head is the granularity of KIVI's values (Liu et al. 2024, arXiv
    2402.02750, section 3); for 8 bits it does for keys as well.
    """

    name = "kv-cache"
    stage = "quantise"
    exact_to = None
    beside_scheme = True

    def run(self, g: Graph, context: Context) -> None:
        """Round what each cache appends."""
        before = _bytes(g)
        for append in g.calls("ssmc::cache_append"):
            cache = operands(append)["cache"]
            if cache.name not in {spec.name for spec in g.states}:
                g.skip(append, "its cache is not one of the model's states")
            elif g.new_states[[s.name for s in g.states].index(cache.name)] is not append:
                g.skip(append, "it is not what its cache becomes")
            elif not all(is_call(n, "ssmc::attention") for n in append.users if n.op != "output"):
                g.skip(append, "another call than attention reads its cache")
            else:
                _hold_integers(g, append, cache)
                g.match(append)
        if g.matched:
            g.note(f"caches take {_bytes(g)} bytes a token, before {before}")


def _hold_integers(g: Graph, append: fx.Node, cache: fx.Node) -> None:
    _, x, position = operands(append).values()
    whole = cache.meta["val"]
    with g.before(append):
        pair = g.call("ssmc::quantize_dynamic", x, like=append, suffix="q")
        q = g.call("getitem", pair, 0, like=append, suffix="int8")
        wide = g.call("getitem", pair, 1, like=append, suffix="scale")
        scale = g.call("to_dtype", wide, torch.bfloat16, like=append, suffix="scale_bf16")
    g.set_state(cache, whole.to(torch.int8))
    scales = g.add_state(f"{cache.name}_scale", whole[..., :1].to(torch.bfloat16), cache)
    with g.before(append):
        new = g.call("ssmc::cache_append", cache, q, position, like=append, suffix="cache")
        new_scales = g.call(
            "ssmc::cache_append", scales, scale, position, like=append, suffix="scales"
        )
        twin = g.call("ssmc::dequantize", new, new_scales, like=append, suffix="dq")
    append.replace_all_uses_with(twin)
    g.carry(cache, new)
    g.carry(scales, new_scales)
    name = append.name
    g.module.graph.erase_node(append)
    new.name = name


def _bytes(g: Graph) -> int:
    """Bytes that a token takes in caches."""
    return sum(spec.zeros(1, "meta", room=1).nbytes for spec in g.states if spec.is_open)
