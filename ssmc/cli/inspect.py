"""`ssmc inspect`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssmc.cli import completion, output

if TYPE_CHECKING:
    from ssmc.compiler import Source
    from ssmc.core import Graph, Pass
    from ssmc.inspection.moments import Moment
    from ssmc.inspection.story import Story
    from ssmc.recipe import Recipe


def run(
    target: Annotated[
        str, typer.Argument(help="A model or an artefact.", autocompletion=completion.target)
    ],
    after: Annotated[
        str | None,
        typer.Option(
            help="After this pass (a model: runs up to it).", autocompletion=completion.one_pass
        ),
    ] = None,
    passes: Annotated[
        str,
        typer.Option(help="Of a model: the passes to run.", autocompletion=completion.pass_list),
    ] = "hadamard,percentile",
    samples: Annotated[int, typer.Option(min=1, help="Of a model: calibration windows.")] = 8,
    layer: Annotated[int | None, typer.Option(min=0, help="Only this layer.")] = None,
    diff: Annotated[bool, typer.Option("--diff", help="What passes changed.")] = False,
    params: Annotated[bool, typer.Option("--params", help="Statistics of the tensors.")] = False,
    numerics: Annotated[
        bool,
        typer.Option("--numerics", help="Signal-to-noise by blocks and operators, worst first."),
    ] = False,
    draw: Annotated[
        bool, typer.Option("--graph", help="A layer drawn as a graph (by default the first).")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(help="Write a report, one HTML file that needs nothing else.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write its plots as PNG to a folder.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="For both: what an artefact was made from, if moved.",
            autocompletion=completion.target,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Look at a graph: as text or drawn, its passes, tensors and errors, or all as a report."""
    from ssmc.errors import UsageError
    from ssmc.runtime import is_artefact

    views = {"--diff": diff, "--params": params, "--numerics": numerics, "--graph": draw}
    chosen = [name for name, wanted in views.items() if wanted]
    chosen += ["--html and --plot"] if html or plot else []
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(chosen)} are different views", hint="choose one")
    if html or plot:
        _check_places(html)
        story = _story(target, passes, samples, model)
        return _write_report(story, layer, html, plot, as_json)
    if is_artefact(target):
        view = _of_artefact(target, after, graph_needed=not (diff or numerics))
    else:
        view = _of_model(target, after, passes, samples, complete=numerics)
    if numerics:
        _show_numerics(view, layer, as_json)
    elif diff:
        _show_diff(view, after, layer, as_json)
    elif params:
        _show_params(view, layer, as_json)
    elif draw:
        _draw_graph(view, layer, as_json)
    else:
        _show_graph(view, layer, as_json)


@dataclass
class _View:
    name: str
    graph: Graph
    report: dict[str, Any]
    before: Moment | None = None
    """The graph in front of the pass asked for."""

    @property
    def records(self) -> list[dict[str, Any]]:
        """One a pass."""
        found: list[dict[str, Any]] = self.report["passes"]
        return found


def _of_artefact(target: str, after: str | None, *, graph_needed: bool) -> _View:
    from ssmc.errors import UsageError, did_you_mean
    from ssmc.runtime import read_artefact

    artefact = read_artefact(target)
    records = artefact.report["passes"]
    names = [record["name"] for record in records]
    if after is not None and after not in names:
        raise UsageError(
            f"{target} was made without pass '{after}'",
            hint=did_you_mean(after, names) or f"its passes: {', '.join(names)}",
        )
    if after not in (None, names[-1]) and graph_needed:
        raise UsageError(
            f"{target} holds the graph after its last pass, {names[-1]}",
            hint=f"add --diff, or inspect the model itself: ssmc inspect MODEL --after {after}",
        )
    return _View(target, artefact.graph, artefact.report)


def _of_model(
    target: str, after: str | None, passes: str, samples: int, *, complete: bool
) -> _View:
    from ssmc.compiler import Hooks, compile_source, make_context, read_source
    from ssmc.core import run_passes
    from ssmc.inspection.moments import Moment
    from ssmc.recipe import make_recipe

    recipe = make_recipe(passes=passes, samples=samples)
    plan = recipe.plan()
    stop = _stop([p.name for p in plan], after)
    output.note(f"loading {target}")
    source = read_source(target, recipe)
    if complete:
        compiled = compile_source(source, recipe, Hooks())
        return _View(target, compiled.graph, compiled.report)
    before = None

    def on_start(p: Pass) -> None:
        nonlocal before
        if p is plan[stop - 1]:
            before = Moment.of(source.graph)

    context = make_context(source, recipe, Hooks())
    report = run_passes(source.graph, plan[:stop], context, on_start)
    return _View(target, source.graph, {"passes": report.to_json()}, before)


def _stop(names: list[str], after: str | None) -> int:
    from ssmc.errors import UsageError, did_you_mean

    if after is None:
        return 0
    if after not in names:
        raise UsageError(
            f"pass '{after}' is not in the plan ({', '.join(names)})",
            hint=did_you_mean(after, names) or f"name it: --passes ...,{after}",
        )
    return names.index(after) + 1


def _show_graph(view: _View, layer: int | None, as_json: bool) -> None:
    from ssmc.core.text import graph_lines

    lines = graph_lines(view.graph, layer)
    _check_layer(view, lines, layer)
    if as_json:
        output.say_json({"target": view.name, "nodes": lines})
    else:
        output.say("\n".join(lines.values()))


def _draw_graph(view: _View, layer: int | None, as_json: bool) -> None:
    from dataclasses import asdict

    from ssmc.inspection.labels import label
    from ssmc.inspection.moments import NEW, Moment
    from ssmc.inspection.terminal import draw

    moment = Moment.of(view.graph)
    layers = moment.layers()
    layer = layer if layer is not None else min(layers, default=0)
    calls = moment.layer(layer)
    _check_layer(view, calls, layer)
    marks = None if view.before is None else moment.marks(view.before, NEW)
    if as_json:
        found = [asdict(c) | ({"mark": marks[c.name]} if marks else {}) for c in calls]
        return output.say_json({"target": view.name, "layer": layer, "calls": found})
    told = "" if view.before is None else f" after {view.records[-1]['name']}: + new, ~ changed"
    output.say(f"layer {layer} of {len(layers)}{told}\n")
    output.say("\n".join(draw(moment, layer, output.console().width, marks)))
    if view.before is not None:
        gone = [c for c in view.before.layer(layer) if c.name not in moment.calls]
        for call in gone:
            output.say(f"- {label(call, view.before).title}   {call.name}")


def _check_places(html: Path | None) -> None:
    from ssmc.inspection.page import check_page
    from ssmc.inspection.plots import check_plots

    check_plots()
    if html is not None:
        check_page(html)


def _write_report(
    story: Story, layer: int | None, html: Path | None, plot: Path | None, as_json: bool
) -> None:
    from ssmc.errors import UsageError
    from ssmc.inspection import page, plots

    layers = story.moment.layers()
    shown = story.worst_layer() if layer is None else layer
    if shown not in layers:
        raise UsageError(
            f"{story.name} has no layer {shown}", hint=f"its layers: 0 to {max(layers, default=0)}"
        )
    drawn = plots.save(story, shown, plot) if plot is not None else []
    if html is not None:
        page.write(story, shown, html)
    written = [*drawn, *([html] if html is not None else [])]
    if as_json:
        files = [str(path) for path in written]
        output.say_json({"target": story.name, "layer": shown, "written": files})
        return
    if plot is not None:
        output.say(f"{'wrote':12} {plot}: {len(drawn)} plots")
    if html is not None:
        output.say(f"{'wrote':12} {html}")


def _story(target: str, passes: str, samples: int, model: str | None) -> Story:
    """Of a model its compilation; of an artefact that of the model it was made from, if it is here.

    An artefact's own recipe is repeated, on its own calibration text.
    """
    from ssmc.compiler import Hooks, read_source
    from ssmc.inspection import story
    from ssmc.recipe import make_recipe
    from ssmc.runtime import is_artefact, load

    hooks = Hooks(on_start=lambda p: output.note(f"pass {p.name}"))
    if not is_artefact(target):
        recipe = make_recipe(passes=passes, samples=samples)
        output.note(f"loading {target}")
        return story.of_compilation(read_source(target, recipe), recipe, target, hooks)
    compiled = load(target, device="cpu")
    recipe = make_recipe(**compiled.about["recipe"])
    source = _source(compiled.about["source"], recipe, model)
    if source is None:
        return story.of_compiled(compiled, target)
    return story.of_compilation(source, recipe, target, hooks)


def _source(made_from: dict[str, Any], recipe: Recipe, model: str | None) -> Source | None:
    """The model an artefact was made from; with a note None where it is not here or another."""
    from ssmc.compiler import read_source
    from ssmc.errors import SsmcError

    name = model or made_from["name"]
    output.note(f"loading {name}")
    try:
        source = read_source(name, recipe)
    except SsmcError as error:
        if model is not None:
            raise
        output.note(f"without the model: {error}; --model says where it is")
        return None
    if source.about["source"].get("fingerprint") == made_from.get("fingerprint"):
        return source
    output.note(f"without the model: {name} is another than that it was made from")
    return None


def _check_layer(view: _View, found: Any, layer: int | None) -> None:
    from ssmc.errors import UsageError

    if not found and layer is not None:
        layers = [n.meta["layer"] for n in view.graph.nodes if n.meta.get("layer") is not None]
        raise UsageError(
            f"{view.name} has no layer {layer}", hint=f"its layers: 0 to {max(layers, default=0)}"
        )


def _show_diff(view: _View, after: str | None, layer: int | None, as_json: bool) -> None:
    records = [r for r in view.records if after in (None, r["name"])]
    if as_json:
        return output.say_json({"target": view.name, "passes": records})
    if not records:
        return output.say("no pass has run; add --after PASS")
    for record in records:
        output.say("\n".join(_diff_lines(record, layer)))


def _diff_lines(record: dict[str, Any], layer: int | None) -> list[str]:
    diff = record["diff"]
    wanted = "" if layer is None else f"layers_{layer}_"
    counts = f"{len(record['matched'])} matched, {len(record['skipped'])} skipped"
    nodes = f"nodes {diff['nodes_before']} -> {diff['nodes_after']}"
    lines = [f"{record['name']}   {counts}   {nodes}   {len(diff['params'])} tensors changed"]
    lines += [f"  {text}" for text in record["notes"]]
    lines += [f"  skipped {s['node']}: {s['reason']}" for s in record["skipped"]]
    lines += [f"- {line}" for line in diff["removed"] if wanted in line]
    lines += [f"+ {line}" for line in diff["added"] if wanted in line]
    dotted = "" if layer is None else f"layers.{layer}."
    changed = {n: s for n, s in diff["params"].items() if dotted in n or wanted in n}
    return [*lines, *(f"  {name}   {_change(*stats)}" for name, stats in changed.items())]


def _change(before: dict[str, Any] | None, after: dict[str, Any] | None) -> str:
    if before is None or after is None:
        stats, sign = (after, "new") if before is None else (before, "gone")
        assert stats is not None
        return f"{sign}   {stats['dtype']} {stats['shape']}"
    return (
        f"absmax {before['absmax']:.4g} -> {after['absmax']:.4g}   "
        f"kurtosis {before['kurtosis']:.1f} -> {after['kurtosis']:.1f}"
    )


def _show_params(view: _View, layer: int | None, as_json: bool) -> None:
    from dataclasses import asdict

    from ssmc.core.diff import param_stats

    wanted = "" if layer is None else f"layers.{layer}."
    stats = {n: asdict(param_stats(t)) for n, t in view.graph.params().items() if wanted in n}
    _check_layer(view, stats, layer)
    if as_json:
        return output.say_json({"target": view.name, "params": stats})
    rows = [
        (
            name,
            s["dtype"],
            "x".join(map(str, s["shape"])) or "1",
            f"{s['absmax']:.4g}",
            f"{s['kurtosis']:.1f}",
        )
        for name, s in stats.items()
    ]
    output.say_table(["tensor", "dtype", "shape", ">absmax", ">kurtosis"], rows)


def _show_numerics(view: _View, layer: int | None, as_json: bool) -> None:
    blocks = [row for row in view.report["numerics"] if layer in (None, row["block"])]
    _check_layer(view, blocks, layer)
    mine = "" if layer is None else f"layer.{layer}."
    operators = [r for r in view.report.get("operators", []) if r["operator"].startswith(mine)]
    if as_json:
        return output.say_json({"target": view.name, "blocks": blocks, "operators": operators})
    found = dict.fromkeys(key for row in blocks for key in row)
    columns = ["output", *(key for key in found if key not in ("block", "output"))]
    rows = [(row["block"], *(_decibels(row.get(c)) for c in columns)) for row in blocks]
    title = "signal-to-noise (dB) on the probe, worst block first"
    output.say_table([">block", *(f">{c}" for c in columns)], rows, title)
    rows = [(r["operator"], _decibels(r["own"]), _decibels(r["output"])) for r in operators]
    title = "operators: the error each adds itself (own), and with all before it (output)"
    output.say_table(["operator", ">own", ">output"], rows, f"\n{title}")


def _decibels(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
