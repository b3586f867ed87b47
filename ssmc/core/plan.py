"""The plan: which passes run, in which order, as a graph of dependencies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations, pairwise

import networkx as nx

from ssmc.core.passes import STAGES, Pass, find_pass
from ssmc.errors import UsageError


def make_plan(given: Sequence[Pass]) -> list[Pass]:
    """`given` in its order, with every pass it needs added where it belongs.

    Raises UsageError where the given order contradicts stages or dependencies, where a pass
    is named twice, two stand in for the same one, or where dependencies go in a circle.
    """
    _reject_twice(given)
    _reject_rivals(given)
    passes = _completed(given)
    order = _dependencies(passes)
    _reject_circles(order)
    _reject_order(given, order)
    order.add_edges_from((a.name, b.name) for a, b in pairwise(given))
    rank = {p.name: (STAGES.index(p.stage), i) for i, p in enumerate(passes)}
    by_name = {p.name: p for p in passes}
    return [by_name[n] for n in nx.lexicographical_topological_sort(order, key=rank.__getitem__)]


def _completed(given: Sequence[Pass]) -> list[Pass]:
    passes = list(given)
    for p in passes:  # grows while it is walked: what was added has needs of its own
        provided = {name for q in passes for name in (q.name, *q.provides)}
        passes += [find_pass(need)() for need in p.needs if need not in provided]
    return passes


def _dependencies(passes: Iterable[Pass]) -> nx.DiGraph:
    order = nx.DiGraph()
    order.add_nodes_from(p.name for p in passes)
    for p in passes:
        for q in passes:
            if _precedes(q, p):
                order.add_edge(q.name, p.name)
    return order


def _precedes(q: Pass, p: Pass) -> bool:
    provides = {q.name, *q.provides}
    needed = q is not p and bool(provides & {*p.needs, *p.after})
    return needed or STAGES.index(q.stage) < STAGES.index(p.stage)


def _reject_twice(given: Sequence[Pass]) -> None:
    names = [p.name for p in given]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"pass '{name}' is named twice", hint="name it once, with its options")


def _reject_rivals(given: Sequence[Pass]) -> None:
    for a, b in combinations(given, 2):
        if {a.name, *a.provides} & {b.name, *b.provides}:
            raise UsageError(
                f"{a.name} and {b.name} stand in for one another", hint="name one of them"
            )


def _reject_circles(order: nx.DiGraph) -> None:
    if not nx.is_directed_acyclic_graph(order):
        circle = " -> ".join(a for a, _ in nx.find_cycle(order))
        raise UsageError(f"these passes need each other in a circle: {circle}")


def _reject_order(given: Sequence[Pass], order: nx.DiGraph) -> None:
    for i, early in enumerate(given):
        for late in given[i + 1 :]:
            if nx.has_path(order, late.name, early.name):
                raise UsageError(
                    f"impossible order: {late.name} ({late.stage}) must run before "
                    f"{early.name} ({early.stage})",
                    hint=f"write --passes {_sorted(given, order)}",
                )


def _sorted(given: Sequence[Pass], order: nx.DiGraph) -> str:
    """`given` in an order that is possible, and otherwise as near to its own as can be."""
    wanted = {p.name: (i, str(p)) for i, p in enumerate(given)}
    closed = nx.transitive_closure_dag(order).subgraph(wanted)
    names = nx.lexicographical_topological_sort(closed, key=lambda n: wanted[n][0])
    return ",".join(wanted[n][1] for n in names)
