"""A compilation told pass by pass: what the graph was, what each pass did, what activations reach.

The compiler runs as it always does; the story is what its hooks hear. Ranges are measured at the
start and where the rewrites end, so that what a rotation does to outliers is seen before anything
is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from ssmc.compiler import Hooks, Source, compile_source, make_context
from ssmc.core import Context, Graph, Pass, Record, find_pass, is_call, make_plan, run_passes
from ssmc.core.dialect import operands
from ssmc.inspection.moments import Moment
from ssmc.passes._calibration import channels, observe
from ssmc.passes.ssm_sites import SCANS
from ssmc.quant.observers import Absmax
from ssmc.recipe import Recipe
from ssmc.runtime import CompiledModel

WATCHED = (
    "in_proj", "q_proj", "gate_proj", "up_proj", "gate_up_proj", "out_proj", "o_proj", "down_proj",
)  # fmt: skip
"""The layers whose inputs are shown; of a scan its operand u and its result y."""
Ranges = dict[int, dict[str, Tensor]]
"""By layer and name of the value: the largest magnitude of each channel, [C]."""


@dataclass
class Step:
    """A pass: its record as report.json has it, and the graph in front of it and behind it."""

    record: dict[str, Any]
    before: Moment
    after: Moment

    @property
    def name(self) -> str:
        """Of the pass."""
        return str(self.record["name"])


@dataclass
class Story:
    """What there is to tell of a target.

    Without the model that an artefact was made from, there are no steps and no ranges: `records`
    and the last `moment` are the artefact's own.
    """

    name: str
    about: dict[str, Any]
    report: dict[str, Any]
    moment: Moment
    steps: list[Step] = field(default_factory=list)
    before: Ranges = field(default_factory=dict)
    after: Ranges = field(default_factory=dict)

    @property
    def records(self) -> list[dict[str, Any]]:
        """One a pass."""
        found: list[dict[str, Any]] = self.report["passes"]
        return found

    def worst_layer(self) -> int:
        """The block with the largest error, or the first layer."""
        blocks = self.report.get("numerics") or []
        layers = self.moment.layers()
        return int(blocks[0]["block"]) if blocks else (layers[0] if layers else 0)


def of_compiled(compiled: CompiledModel, name: str) -> Story:
    """What an artefact has to tell by itself."""
    return Story(name, compiled.about, compiled.report, Moment.of(compiled.graph))


def of_compilation(source: Source, recipe: Recipe, name: str, hooks: Hooks) -> Story:
    """Compile a source and tell how that went.

    Raises what the compiler does.
    """
    listener = Listener(source, recipe, hooks)
    return listener.story(compile_source(source, recipe, listener.hooks()), name)


class Listener:
    """Keeps the moments between passes, and measures ranges where the rewrites begin and end.

    The compiler is given `hooks()`, which pass on to the `hooks` here what they hear.
    """

    def __init__(self, source: Source, recipe: Recipe, hooks: Hooks) -> None:
        self.source, self.recipe, self.inner = source, recipe, hooks
        self.context = make_context(source, recipe, Hooks())
        self.steps: list[Step] = []
        self.moment = Moment.of(source.graph)
        self.before = ranges(source.graph.copy(), self.context)
        self.after: Ranges = {}

    def story(self, compiled: CompiledModel, name: str) -> Story:
        """What was heard, with what came of it."""
        after = self.after or ranges(compiled.graph.copy(), self.context)
        return Story(
            name, compiled.about, compiled.report, Moment.of(compiled.graph), self.steps,
            self.before, after,
        )  # fmt: skip

    def hooks(self) -> Hooks:
        """The hooks of the compiler."""
        return Hooks(self.on_start, self.on_pass, self.inner.progress, self.inner.crash_folder)

    def on_start(self, p: Pass) -> None:
        """A pass begins."""
        if p.stage not in ("analyse", "rewrite") and not self.after:
            self.after = ranges(self.source.graph.copy(), self.context)
        self.inner.on_start(p)

    def on_pass(self, record: Record, g: Graph) -> None:
        """A pass has ended."""
        after = Moment.of(g)
        self.steps.append(Step(record.to_json(timing=False), self.moment, after))
        self.moment = after
        self.inner.on_pass(record, g)


def ranges(g: Graph, context: Context) -> Ranges:
    """The largest magnitude of each channel of the values shown, on the calibration text."""
    run_passes(g, make_plan([find_pass("linears")()]), context)
    shown = _watched(g)
    watched = {value.node: Absmax() for value in shown}
    observe(g, watched, context)
    found: Ranges = {}
    for value in shown:
        largest = watched[value.node].channel().reshape(-1, value.channels).amax(0)
        found.setdefault(value.layer, {})[value.name] = largest
    return found


@dataclass(frozen=True)
class _Watched:
    """A value to be shown; of a token's several experts the channels are seen together."""

    layer: int
    name: str
    node: fx.Node
    channels: int


def _watched(g: Graph) -> list[_Watched]:
    """Values of the layers to be shown, what several linear layers read once."""
    linears = {linear.node: linear for linear in g.facts["linears"]}
    found: list[_Watched] = []
    inputs: set[fx.Node] = set()
    for node in g.nodes:
        linear, layer = linears.get(node), node.meta.get("layer")
        if layer is None:
            continue
        if is_call(node, *SCANS):
            found += [_Watched(layer, n, v, channels(v).numel()) for n, v in _of_scan(node)]
        elif linear is not None and linear.role in WATCHED and linear.input not in inputs:
            inputs.add(linear.input)
            of = "expert " if is_call(node, "ssmc::expert_linear") else ""
            columns = linear.weight.meta["val"].shape[-1]
            found.append(_Watched(layer, f"{of}{linear.role} input", linear.input, columns))
    return found


def _of_scan(scan: fx.Node) -> list[tuple[str, fx.Node]]:
    given = operands(scan)
    y = next(n for n in scan.users if is_call(n, "getitem") and n.args[1] == 0)
    return [("u", given.get("u") or given["x"]), ("y", y)]
