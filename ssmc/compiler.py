"""The compiler: a model in, a compiled model out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

import ssmc
from ssmc.core import Context, Graph, Pass, Record, run_passes
from ssmc.core.diff import tensor_hash
from ssmc.core.graph import LENGTH
from ssmc.core.journal import Journal
from ssmc.core.numerics import block_numerics, operator_numerics
from ssmc.core.options import PassSpec, parse_passes
from ssmc.core.pipeline import check_passes, probed, relative_error, signal_to_noise
from ssmc.core.ranks import find_ranks
from ssmc.core.report import Report
from ssmc.core.store import Store
from ssmc.corpus import file_hash, read_texts, sample_windows, token_windows
from ssmc.device import find_device, move
from ssmc.errors import UsageError
from ssmc.frontend import Model, huggingface, load_model, trace
from ssmc.lowering import BACKENDS
from ssmc.overlap import run_hashes, to_text
from ssmc.passes._formats import operators
from ssmc.recipe import Recipe, find_recipe, make_recipe
from ssmc.runtime import Artefact, CompiledModel, choose_backend
from ssmc.runtime.template import read_chat_template
from ssmc.work import Work

CALIBRATION_BATCH = 8
PROBE_LENGTH = 64

Inputs = tuple[torch.Tensor, ...]


@dataclass
class Hooks:
    """What a caller hears: each pass as it starts and ends, and how far a long one is."""

    on_start: Callable[[Pass], None] = lambda p: None
    on_pass: Callable[[Record, Graph], None] = lambda record, graph: None
    progress: Callable[[int, int], None] = lambda done, total: None
    crash_folder: Path | None = None


@dataclass
class Source:
    """What is compiled: the traced graph and where it came from."""

    graph: Graph
    about: dict[str, Any] = field(default_factory=dict)
    calibration: list[Inputs] = field(default_factory=list)
    tokenizer: str | None = None

    def to(self, device: torch.device) -> Source:
        """The same source, to be run on `device`.

        Its batches go there; its tensors stay, and each is fetched when it is its turn.
        """
        self.graph.elsewhere = device
        self.calibration = [tuple(x.to(device) for x in batch) for batch in self.calibration]
        return self


def compile(
    model: str | nn.Module,
    example_inputs: Sequence[torch.Tensor] | torch.Tensor | None = None,
    *,
    recipe: str | Path | None = None,
    passes: str | Sequence[PassSpec] | None = None,
    calibration: str | Path | torch.Tensor | Iterable[Any] | None = None,
    scheme: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int | None = None,
    backend: str | None = None,
    device: str | None = None,
    max_memory: int | str | None = None,
    work: str | Path | None = None,
    resume: bool = False,
    hooks: Hooks | None = None,
) -> CompiledModel:
    """Trace `model`, run the passes of a recipe over it and lower it.

    `recipe` is the name of one that comes with ssmc (`ssmc recipes`) or a file; what else is given
    goes over it. Without it `passes` are "hadamard,percentile", the scheme is "w8a8", and 64
    windows (`samples`) of 512 tokens (`length`) calibrate, drawn with seed 0.

    `model` is anything `ssmc compile` takes, a Hugging Face causal language model, or any torch
    module that uses `ssmc.ops` (then with `example_inputs`, a tuple of tensors whose first
    dimension is the batch and whose second is the length). `calibration` is a text file for a
    model with a tokenizer, else tensors of inputs [n, length, ...], or batches of them. Passes run
    on `device` (`cpu`, `cuda` or `auto`; by default where the model is); the result stays there.

    With `max_memory` ("6GB", or bytes) weights are streamed through files, and the process stays
    below that. `work` is a folder for these files and for progress that outlives the process: with
    `resume`, what an earlier call with the same arguments kept there is not done again.

    Raises UsageError, UnsupportedError, PassError, NumericsError or DeviceError (see ssmc.errors).
    """
    found = find_device(device) if device else None
    if not (passes is None or isinstance(passes, str)):
        passes = [{p.name: p.options()} for p in parse_passes(passes)]
    given: dict[str, Any] = {
        "passes": passes,
        "scheme": scheme,
        "calibration": str(calibration) if isinstance(calibration, str | Path) else None,
        "samples": samples,
        "length": length,
        "seed": seed,
        "backend": backend,
    }
    given = {name: value for name, value in given.items() if value is not None}
    resolved = make_recipe(**given) if recipe is None else find_recipe(recipe, **given)
    place = Work(Path(work) if work is not None else None, max_memory, resume)
    source = read_source(model, resolved, example_inputs, calibration, place.store())
    source = source.to(found) if found else source
    with place.journal(identity(source, resolved)) as journal:
        return compile_source(source, resolved, hooks or Hooks(), journal)


def read_source(
    model: str | nn.Module,
    recipe: Recipe,
    example_inputs: Sequence[torch.Tensor] | torch.Tensor | None = None,
    calibration: Any = None,
    store: Store | None = None,
) -> Source:
    """Load and trace a model, its weights in `store`, and cut its calibration text into batches."""
    if isinstance(model, str):
        source = _checkpoint_source(load_model(model, store=store), recipe)
        source.graph.store = store
        return source
    graph = trace(model, example_inputs)
    graph.store = store
    about = {
        "source": {"kind": "module", "name": type(model).__name__},
        "config": huggingface.described(model),
    }
    batches = _given_batches(calibration, example_inputs)
    return Source(graph, about, batches)


def _checkpoint_source(model: Model, recipe: Recipe) -> Source:
    windows, about = calibration_windows(model, recipe)
    source = {
        "kind": model.kind,
        "name": model.name,
        "fingerprint": model.fingerprint,
        "float_bytes": model.float_bytes,
    }
    return Source(
        trace(model.module),
        {
            "source": source,
            "config": huggingface.described(model.module),
            "calibration": about,
            "eos": model.eos_token_id,
            "chat": read_chat_template(model.folder),
        },
        [(batch,) for batch in windows.split(CALIBRATION_BATCH)],
        model.tokenizer.to_str() if model.tokenizer else None,
    )


def calibration_windows(model: Model, recipe: Recipe) -> tuple[torch.Tensor, dict[str, Any]]:
    """The calibration windows [samples, length] of a model's recipe, and where they come from."""
    from ssmc.demo import calibration_file

    path = Path(recipe.calibration) if recipe.calibration else calibration_file()
    if model.tokenizer is None or model.eos_token_id is None:
        raise UsageError(
            f"{model.name} has no tokenizer, so no text can calibrate it",
            hint="put its tokenizer.json into the model's folder",
        )
    cut = token_windows(
        model.tokenizer, read_texts(path), model.eos_token_id, recipe.length, str(path)
    )
    windows = sample_windows(cut, recipe.samples, recipe.seed)
    about = {
        "file": path.name,
        "sha256": file_hash(path),
        "windows": len(windows),
        "length": recipe.length,
        "runs": to_text(run_hashes(windows)),
    }
    return windows, about


def _given_batches(calibration: Any, example_inputs: Any) -> list[Inputs]:
    if isinstance(calibration, str | Path):
        raise UsageError("a module without a tokenizer calibrates on tensors, not on a text file")
    if calibration is None:
        given = [example_inputs] if example_inputs is not None else []
    elif isinstance(calibration, torch.Tensor):
        given = list(calibration.split(CALIBRATION_BATCH))
    else:
        given = list(calibration)
    return [(batch,) if isinstance(batch, torch.Tensor) else tuple(batch) for batch in given]


@dataclass
class Prepared:
    """A source rewritten and calibrated, in place: what is left is to quantise and to lower it.

    `done` are the passes that ran, `report` is what they did, `reference` is the graph before the
    first of them that may change the result. What `finish` makes of it depends on this and on the
    passes of the quantise stage alone, so variants can branch off here.
    """

    source: Source
    context: Context
    done: list[Pass]
    report: Report
    reference: Graph


def prepare(
    source: Source, recipe: Recipe, hooks: Hooks, journal: Journal | None = None
) -> Prepared:
    """Run the recipe's plan over a source up to the quantise stage, keeping a journal if given."""
    plan = recipe.plan()
    backend = BACKENDS[choose_backend(recipe.backend, source.graph.runs_on)]
    kernels = backend.load()  # fails now or never
    check_passes(source.graph, plan)
    context = make_context(source, recipe, hooks)
    context.journal, context.ranks = journal, find_ranks()
    if source.graph.runs_on.type == "cuda":  # on a CPU the result does not depend on the backend
        context.kernels = kernels
    exact: list[Graph] = []  # the graph before the first pass that may change the result

    def on_start(p: Pass) -> None:
        hooks.on_start(p)
        if p.stage == "reconstruct" and not exact:
            exact.append(source.graph.copy())

    done = [p for p in plan if p.stage != "quantise"]
    report = run_passes(source.graph, done, context, on_start, hooks.on_pass, hooks.crash_folder)
    reference = exact[0] if exact else source.graph.copy()
    return Prepared(source, context, done, report, reference)


def finish(prepared: Prepared, recipe: Recipe, hooks: Hooks) -> CompiledModel:
    """Run what is left of the recipe's plan, and lower the result."""
    source, context, plan = prepared.source, prepared.context, recipe.plan()
    reference = prepared.reference
    rest = run_passes(
        source.graph, plan[len(prepared.done) :], context, hooks.on_start, hooks.on_pass,
        hooks.crash_folder, prepared.done,
    )  # fmt: skip
    report = Report(prepared.report.records + rest.records)
    measured = _numerics(source.graph, reference, context)
    about = _about(source, recipe, plan) | {"metrics": _metrics(source.graph, reference, context)}
    move(source.graph, source.graph.runs_on)  # only now, so that there is room for the reference
    artefact = Artefact(source.graph, about=about, tokenizer=source.tokenizer)
    compiled = CompiledModel(artefact, recipe.backend)
    lowered = {"fused": compiled.lowered.fused, "kept": compiled.lowered.kept}
    artefact.report = {"passes": report.to_json(timing=False), "lowering": lowered} | measured
    return compiled


def compile_source(
    source: Source, recipe: Recipe, hooks: Hooks, journal: Journal | None = None
) -> CompiledModel:
    """Run the recipe's plan over a source and lower the result."""
    return finish(prepare(source, recipe, hooks, journal), recipe, hooks)


def make_context(source: Source, recipe: Recipe, hooks: Hooks) -> Context:
    """The calibration batches, and the start of two of its sequences as the probe."""
    probe = None
    if source.calibration:
        inputs = [source.graph.node(name) for name in source.graph.inputs]
        probe = tuple(map(_cut, source.calibration[0], inputs))
    return Context(source.calibration, probe, recipe.seed, hooks.progress)


def _cut(x: torch.Tensor, node: fx.Node) -> torch.Tensor:
    lengthy = LENGTH in node.meta["val"].shape[1:2]
    return (x[:2, :PROBE_LENGTH] if lengthy else x[:2]).contiguous()


def identity(source: Source, recipe: Recipe) -> dict[str, Any]:
    """What the progress of a compilation depends on, by topic."""
    model = source.about["source"]
    if "fingerprint" not in model:
        hashes = {name: tensor_hash(value) for name, value in source.graph.params().items()}
        model = model | {"tensors": hashes}
    given = [[tensor_hash(x) for x in batch] for batch in source.calibration]
    return {
        "model": model,
        "recipe": _resolved(recipe, recipe.plan()),
        "calibration text": source.about.get("calibration", given),
        "environment": _tools()
        | {"device": source.graph.runs_on.type, "processes": find_ranks().count},
    }


def _about(source: Source, recipe: Recipe, plan: Sequence[Pass]) -> dict[str, Any]:
    return {**source.about, "tools": _tools(), "recipe": _resolved(recipe, plan)}


def _resolved(recipe: Recipe, plan: Sequence[Pass]) -> dict[str, Any]:
    options = [{p.name: p.options()} for p in plan]
    return recipe.model_copy(update={"passes": options}).model_dump()


def _tools() -> dict[str, str]:
    return {"ssmc": ssmc.__version__, "torch": str(torch.__version__)}


def _numerics(g: Graph, reference: Graph, context: Context) -> dict[str, Any]:
    if context.probe is None:
        return {"numerics": [], "operators": []}
    addresses = {o.node.name: o.address for o in operators(reference)}
    return {
        "numerics": block_numerics(g, reference, context.probe),
        "operators": operator_numerics(g, reference, addresses, context.probe),
    }


def _metrics(g: Graph, reference: Graph, context: Context) -> dict[str, Any]:
    if context.probe is None:
        return {}
    expected, value = (probed(graph, context.probe) for graph in (reference, g))
    agreement = (expected.argmax(-1) == value.argmax(-1)).double().mean().item()
    error = relative_error(value, expected)
    ratio = signal_to_noise(value, expected) if error else None
    return {"probe_signal_to_noise_db": ratio, "probe_top1_agreement": agreement}
