"""Runs a plan: everything around a pass that its author need not write.

Around each pass: the analyses it needs, lint and legality, numeric parity on a probe, the diff
of nodes and parameters, time, one record; on failure a bundle to reproduce it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from ssmc.core.diff import Snapshot, difference
from ssmc.core.graph import Graph, check_finite, unseen
from ssmc.core.journal import Log
from ssmc.core.legality import check_graph, check_tensors
from ssmc.core.passes import Context, Pass, find_pass, known_passes
from ssmc.core.report import Record, Report
from ssmc.core.text import graph_text
from ssmc.errors import PassError, SsmcError

OnStart = Callable[[Pass], None]
OnPass = Callable[[Record, Graph], None]

PIECE = 2**20
"""Values that are compared at a time: a large result would take a multiple of it as float64."""


def run_passes(
    g: Graph,
    plan: Sequence[Pass],
    context: Context,
    on_start: OnStart = lambda p: None,
    on_pass: OnPass = lambda record, graph: None,
    crash_folder: Path | None = None,
    before: Sequence[Pass] = (),
) -> Report:
    """Run `plan` over `g` in place, behind the passes `before`, and report what each pass did.

    Raises PassError where a pass fails, leaves an illegal graph, or changes the probe's result
    by more than its `exact_to`; an error of another SsmcError type keeps it. Both name the pass.
    NaN or infinity in a tensor or in a value of the probe raises NumericsError naming it. With
    `crash_folder`, an unexpected failure leaves a bundle there.
    """
    report = Report()
    check_tensors(g)
    check_passes(g, plan)
    result: torch.Tensor | None = None
    for number, p in enumerate(plan, len(before)):
        text = graph_text(g)
        context.log = Log(context.journal, f"{number} {p}")
        on_start(p)
        try:
            with _named(p):
                record, result = _run_or_repeat(g, p, context, result)
        except SsmcError:
            raise
        except Exception as error:
            bundle = _bundle(crash_folder, text, [*before, *plan], p)
            raise _failure(p, error, bundle) from error
        finally:
            context.log = Log()
        report.records.append(record)
        on_pass(record, g)
    return report


def check_passes(g: Graph, plan: Sequence[Pass]) -> None:
    """Raise UsageError for options that name what `g` does not have."""
    for p in plan:
        with _named(p):
            p.check(g)


@contextlib.contextmanager
def _named(p: Pass) -> Iterator[None]:
    """What goes wrong with ssmc's own message names the pass."""
    try:
        yield
    except SsmcError as error:
        error.args = (f"pass {p.name}: {error}",)
        raise


def _run_or_repeat(
    g: Graph, p: Pass, context: Context, expected: torch.Tensor | None
) -> tuple[Record, torch.Tensor | None]:
    """As `run_pass`; one that ended before, as the journal says, is not checked again."""
    known = context.log.record()
    if known is None:
        record, expected = run_pass(g, p, context, expected)
        context.log.ended(record.to_json())
        return record, expected
    g.matched, g.skipped, g.notes = [], [], []
    apply_pass(g, p, context)
    return Record.from_json(known), None


def run_pass(
    g: Graph, p: Pass, context: Context, expected: torch.Tensor | None = None
) -> tuple[Record, torch.Tensor | None]:
    """Run one pass with all the checks around it.

    `expected` is the probe's result before it, where that is known; its result behind it is
    returned beside the record, if it was needed.
    """
    record = Record(p.name, p.stage, p.options(), limit=p.exact_to)
    _analyse(g, p, context)
    probe = context.probe if p.stage != "analyse" else None
    if probe is not None and expected is None:
        expected = probed(g, probe)
    before = Snapshot.of(g)
    g.matched, g.skipped, g.notes = record.matched, record.skipped, record.notes
    start = time.perf_counter()
    apply_pass(g, p, context)
    record.seconds = time.perf_counter() - start
    record.diff = difference(before, Snapshot.of(g))
    if probe is not None and expected is not None:
        check_tensors(g, record.diff.params)
        found = probed(g, probe)
        record.error = _parity(p, found, expected)
        expected = found
    if not (record.matched or record.skipped or record.diff):
        record.notes.append("the model has nothing for it")
    return record, expected


def apply_pass(g: Graph, p: Pass, context: Context) -> None:
    """Run one pass on the analyses it needs, and nothing around it: no parity, no statistics."""
    _analyse(g, p, context)
    p.run(g, context)
    check_graph(g, p.stage)
    g.finish()
    if p.stage != "analyse":
        _invalidate(g, p)


def _analyse(g: Graph, p: Pass, context: Context) -> None:
    for need in p.needs:
        cls = find_pass(need)
        if cls.stage == "analyse" and need not in g.facts:
            _analyse(g, cls(), context)
            g.matched, g.skipped = [], []  # what it finds again belongs to no record
            cls().run(g, context)


def _invalidate(g: Graph, p: Pass) -> None:
    known = set(known_passes())
    for name in [n for n in g.facts if n in known and n not in p.preserves]:
        if find_pass(name).stage == "analyse":
            del g.facts[name]


def probed(g: Graph, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The first result of `g` in float32, on the host, where it takes no memory from a pass.

    Raises NumericsError naming the first value with NaN or infinity, if the result has any.
    """
    result = g.watch(unseen, *inputs)
    first = result[0] if isinstance(result, tuple) else result
    if not torch.isfinite(first).all():
        g.watch(check_finite, *inputs)
    return first.float().cpu()


def _parity(p: Pass, found: torch.Tensor, expected: torch.Tensor) -> float:
    error = relative_error(found, expected)
    if p.exact_to is not None and not error <= p.exact_to:
        raise PassError(
            f"the result on the probe changed by {error:.1e} relative, "
            f"more than the {p.exact_to:.0e} it may",
            hint="`--debug` shows the traceback; `ssmc inspect --after` shows the graph before it",
        )
    return error


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """||value - reference|| / ||reference||, in float64, where `value` is."""
    parts = zip(value.reshape(-1).split(PIECE), reference.reshape(-1).split(PIECE), strict=True)
    norms = torch.stack([_norms(x, y.to(x.device)) for x, y in parts])
    error, size = norms.norm(dim=0)
    return (error / size.clamp_min(1e-300)).item()


def _norms(value: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """||value - reference|| and ||reference||."""
    reference = reference.double()
    return torch.stack([(value.double() - reference).norm(), reference.norm()])


def signal_to_noise(value: torch.Tensor, reference: torch.Tensor) -> float:
    """20 log10(||reference|| / ||value - reference||), in dB; infinite where they are equal."""
    return -20 * torch.tensor(relative_error(value, reference), dtype=torch.float64).log10().item()


def _failure(p: Pass, error: Exception, bundle: Path | None) -> PassError:
    frames = traceback.extract_tb(error.__traceback__)
    home = getattr(sys.modules.get(type(p).__module__), "__file__", None)
    own = [f for f in frames if f.filename == home]
    frame = (own or frames)[-1]
    where = f"{frame.filename}:{frame.lineno}"
    hint = f"the graph before it, the recipe and the traceback are in {bundle}" if bundle else None
    return PassError(f"pass {p.name} failed: {type(error).__name__}: {error} ({where})", hint=hint)


def _bundle(folder: Path | None, text: str, plan: Sequence[Pass], failed: Pass) -> Path | None:
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    recipe = [{p.name: p.options()} for p in plan]
    passes = ",".join(str(p) for p in plan[: list(plan).index(failed) + 1])
    (folder / "graph.txt").write_text(text + "\n")
    (folder / "recipe.json").write_text(json.dumps({"passes": recipe}, indent=2) + "\n")
    (folder / "traceback.txt").write_text(traceback.format_exc())
    (folder / "rerun.txt").write_text(f"ssmc compile MODEL --passes '{passes}' --debug -o OUT\n")
    return folder
