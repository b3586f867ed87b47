"""The rules of the triton backend without its kernels: the operators' references run instead."""

from __future__ import annotations

from collections import Counter

import torch

from ssmc.core import Graph, States
from ssmc.core.dialect import target_name
from ssmc.lowering import Backend, Form, Lowered, lower
from ssmc.lowering.backends.triton import TRITON
from ssmc.lowering.rewriter import VIEWS

RULES = Backend("rules", rules=TRITON.rules, step_rules=TRITON.step_rules)


def fused(graph: Graph, form: Form = "sequence") -> Lowered:
    """`graph`, lowered with the rules."""
    return lower(graph, RULES, form)


def calls(graph: Graph, layer: int | None = None) -> Counter[str]:
    """How often each operator is called in a layer (None: outside of them), views left out."""
    names = (
        target_name(node.target)
        for node in graph.nodes
        if node.op == "call_function" and node.meta.get("layer") == layer
    )
    return Counter(name.removeprefix("ssmc::") for name in names if name not in VIEWS)


def clones(states: States) -> States:
    return {name: state.clone() for name, state in states.items()}


def same_states(one: States, other: States) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)
