"""The compiler's core: graph, patterns, the pass contract, the pipeline. Knows no architecture."""

from ssmc.core.graph import Graph, is_call
from ssmc.core.passes import Context, Pass, find_pass, known_passes, register
from ssmc.core.pattern import Match, op
from ssmc.core.pipeline import run_passes
from ssmc.core.plan import make_plan
from ssmc.core.report import Record, Report
from ssmc.core.state import States, StateSpec, fresh_states

__all__ = [
    "Context",
    "Graph",
    "Match",
    "Pass",
    "Record",
    "Report",
    "StateSpec",
    "States",
    "find_pass",
    "fresh_states",
    "is_call",
    "known_passes",
    "make_plan",
    "op",
    "register",
    "run_passes",
]
