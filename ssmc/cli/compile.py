"""`ssmc compile`."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssmc.cli import completion, output

if TYPE_CHECKING:
    from ssmc.cli.auto import Auto
    from ssmc.compiler import Prepared, Source
    from ssmc.core import Graph, Pass, Record
    from ssmc.core.journal import Journal
    from ssmc.inspection.story import Listener, Story
    from ssmc.recipe import Recipe
    from ssmc.runtime import CompiledModel
    from ssmc.work import Work


def run(
    model: Annotated[
        str,
        typer.Argument(
            help="A Hugging Face id, a local folder, a state-spaces folder, or demo.",
            autocompletion=completion.target,
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the artefact.")
    ] = None,
    passes: Annotated[
        str | None,
        typer.Option(
            help="Passes, in order: hadamard{block=128},percentile{p=0.99999}.",
            autocompletion=completion.pass_list,
        ),
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            help="w8a8 (default), w4a8, w8a16, w4a16, w3a16, w2a16, auto or none.",
            autocompletion=completion.SCHEMES,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Recipe: a name (`ssmc recipes`) or a file; options here go over it.",
            autocompletion=completion.recipe,
        ),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Calibration text, .jsonl or .txt (default: the embedded).")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration windows (64).")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens a window (512).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draw of windows (0).")] = None,
    backend: Annotated[
        str | None,
        typer.Option(help="auto, reference, cpu or triton.", autocompletion=completion.BACKENDS),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            help="auto, cpu or cuda: where passes run.", autocompletion=completion.DEVICES
        ),
    ] = "auto",
    max_memory: Annotated[
        str | None, typer.Option(help="Stream weights through files, to stay below it: 6GB.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where a run that was killed had come.")
    ] = False,
    max_loss: Annotated[
        str | None, typer.Option(help="Of auto: how much perplexity may rise, as in 0.5%.")
    ] = None,
    candidates: Annotated[
        str | None,
        typer.Option(help="Of auto: formats, the first to start with (w8a8,w4a8,w4a16,float)."),
    ] = None,
    evaluations: Annotated[
        int | None, typer.Option(min=1, help="Of auto: variants scored, at most (200).")
    ] = None,
    search_text: Annotated[
        Path | None,
        typer.Option(help="Of auto: text to score on (what calibration leaves of its text)."),
    ] = None,
    search_windows: Annotated[
        int | None, typer.Option(min=1, help="Of auto: windows of that text (8).")
    ] = None,
    write_recipe: Annotated[
        Path | None, typer.Option(help="Write what was done as a recipe (YAML), too.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write an HTML report of the compilation, too.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the artefact in OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Trace MODEL, run passes over it, and write a verified int8 artefact to OUT."""
    from ssmc.cli.auto import AUTO, BASE, read_auto
    from ssmc.recipe import find_recipe, make_recipe
    from ssmc.work import Work

    given = {
        "passes": passes,
        "scheme": scheme,
        "calibration": str(calibration) if calibration else None,
        "samples": samples,
        "length": length,
        "seed": seed,
        "backend": backend,
    }
    if recipe is not None:
        resolved = find_recipe(recipe, **given)
    else:
        resolved = make_recipe(**{k: v for k, v in given.items() if v is not None}, where="options")
    wanted = {"candidates": candidates, "evaluations": evaluations, "windows": search_windows}
    auto = read_auto(resolved.scheme, max_loss, search_text, **wanted)
    if resolved.scheme == AUTO:
        resolved = resolved.model_copy(update={"scheme": BASE})
    plan = resolved.plan()
    if dry_run:
        return _show_plan(model, plan, resolved, auto, as_json)
    _check_writable(write_recipe)
    if report is not None:
        from ssmc.inspection.page import check_page

        check_page(report)
    out = _checked_output(out, force)
    work = Work(out.with_name(f"{out.name}.progress"), max_memory, resume)
    job = _Job(model, out, resolved, auto, work, device, force, as_json, report)
    with output.of_first_rank() as ranks:
        compiled = job.run()
    if write_recipe is not None and ranks.number == 0:
        _write_recipe(write_recipe, compiled.about["recipe"])


def _checked_output(out: Path | None, force: bool) -> Path:
    from ssmc.errors import UsageError
    from ssmc.runtime.artefact import check_output

    if out is None:
        raise UsageError("no output folder", hint="add -o OUT")
    check_output(out, force=force)
    return out


def _check_writable(path: Path | None) -> None:
    from ssmc.errors import UsageError

    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UsageError(
            f"cannot write {path}: it is a folder, or in none",
            hint="name a file, as in recipe.yaml",
        )


def _write_recipe(path: Path, recipe: dict[str, Any]) -> None:
    import yaml

    from ssmc.errors import UsageError

    try:
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror}", hint="ssmc.json of the artefact is a recipe"
        ) from None


def _show_plan(
    model: str, plan: list[Pass], recipe: Recipe, auto: Auto | None, as_json: bool
) -> None:
    if as_json:
        data = {"model": model, "plan": [{p.name: p.options()} for p in plan]}
        searched = {} if auto is None else {"search": auto.to_json()}
        return output.say_json(data | {"recipe": recipe.model_dump()} | searched)
    named = _named(recipe)
    rows = [(p.stage, str(p), "" if p.name in named else "added") for p in plan]
    output.say_table(["stage", "pass", ""], rows, f"plan for {model}")
    if auto is not None:
        output.say("\n" + "\n".join(auto.lines(recipe)))


def _named(recipe: Recipe) -> set[str]:
    from ssmc.core.options import parse_passes

    return {p.name for p in parse_passes(recipe.passes)}


@dataclass(frozen=True)
class _Job:
    model: str
    out: Path
    recipe: Recipe
    auto: Auto | None
    work: Work
    device: str
    force: bool
    as_json: bool
    report: Path | None = None

    def run(self) -> CompiledModel:
        """Compile, write and show."""
        from ssmc.compiler import finish, prepare, read_source
        from ssmc.device import find_device

        found = find_device(self.device)
        output.note(f"loading {self.model}")
        source = read_source(self.model, self.recipe, store=self.work.store()).to(found)
        windows = self._windows(source)
        screen = _Screen(self.recipe, self.out, quiet=self.as_json)
        screen.header(source, self.recipe)
        listener = self._listener(source, screen.hooks())
        hooks = screen.hooks() if listener is None else listener.hooks()
        with self._journal(source) as journal, screen.bar:
            prepared = prepare(source, self.recipe, hooks, journal)
            recipe, searched = self._choose(prepared, windows)
            compiled = finish(prepared, recipe, hooks)
            if not journal.first:
                return compiled
            compiled.save(self.out, force=self.force)
        if listener is not None:
            self._write_report(listener.story(compiled, self.model))
        if self.as_json:
            output.say_json(_summary(compiled, self.out) | {"passes": screen.records} | searched)
        else:
            _say_summary(_summary(compiled, self.out))
            if self.report is not None:
                output.say(f"report       {self.report}")
        return compiled

    @contextlib.contextmanager
    def _journal(self, source: Source) -> Iterator[Journal]:
        """The journal, and on an interruption how to go on."""
        from ssmc.compiler import identity

        with self.work.journal(identity(source, self.recipe)) as journal:
            assert journal is not None
            try:
                yield journal
            except KeyboardInterrupt:
                if journal.published:
                    output.note(f"{journal.folder} holds what is done; --resume goes on from there")
                raise

    def _listener(self, source: Source, hooks: Any) -> Listener | None:
        if self.report is None:
            return None
        from ssmc.inspection.story import Listener

        return Listener(source, self.recipe, hooks)

    def _write_report(self, story: Story) -> None:
        from ssmc.inspection import page

        assert self.report is not None
        page.write(story, story.worst_layer(), self.report)

    def _windows(self, source: Source) -> Any:
        if self.auto is None:
            return None
        from ssmc.tuning.trials import held_out_windows, quantise_of

        quantise_of(self.recipe.plan())
        return held_out_windows(source, self.recipe, self.auto.text, self.auto.windows)

    def _choose(self, prepared: Prepared, windows: Any) -> tuple[Recipe, dict[str, Any]]:
        if self.auto is None:
            return self.recipe, {}
        from ssmc.cli import auto

        recipe, found = auto.choose_bits(self.auto, prepared, self.recipe, windows)
        if not self.as_json:
            auto.say(self.auto, found, prepared.source.graph)
        return recipe, {"search": self.auto.to_json() | auto.to_json(found)}


class _Screen:
    """Shows each pass as it ends, with what it matched and changed."""

    def __init__(self, recipe: Recipe, out: Path, quiet: bool) -> None:
        self.plan = recipe.plan()
        self.crash_folder = out.with_name(f"{out.name}.crash")
        self.quiet = quiet
        self.records: list[dict[str, Any]] = []
        self.bar = ExitStack()

    def header(self, source: Source, recipe: Recipe) -> None:
        """The model, the calibration and the plan."""
        if self.quiet:
            return
        about, text = source.about["source"], source.about["calibration"]
        named = _named(recipe)
        names = [p.name if p.name in named else f"+{p.name}" for p in self.plan]
        legend = "   (+\xa0added)" if len(named) < len(names) else ""
        plan = " ".join(names) + legend
        size = output.megabytes(about["float_bytes"])
        output.say(f"model        {about['name']} ({about['kind']}), {size} at 16 bit")
        output.say(
            f"calibration  {text['file']}, {text['windows']} windows of {text['length']} tokens"
        )
        lines = textwrap.wrap(plan, output.WIDTH - 13, break_on_hyphens=False)
        indented = ("\n" + 13 * " ").join(lines)
        output.say(f"plan         {indented}\n".replace("\xa0", " "))

    def hooks(self) -> Any:
        """What the compiler calls."""
        from ssmc.compiler import Hooks

        return Hooks(self.start, self.end, lambda *a: self.report(*a), self.crash_folder)

    def start(self, p: Pass) -> None:
        """A pass begins."""
        number = [q.name for q in self.plan].index(p.name) + 1
        self.report = self.bar.enter_context(
            output.progress(f"({number}/{len(self.plan)}) {p.name}")
        )

    def end(self, record: Record, graph: Graph) -> None:
        """A pass has ended."""
        self.bar.close()
        self.records.append(record.to_json())
        if not self.quiet:
            for line in record_lines(record):
                output.say(line)


def record_lines(record: Record) -> Iterator[str]:
    """What a pass did, in a line; then a line for each reason it skipped something."""
    diff = record.diff
    changes = []
    if diff.nodes_before != diff.nodes_after:
        changes.append(f"nodes {diff.nodes_before} -> {diff.nodes_after}")
    if diff.params:
        changes.append(f"{len(diff.params)} tensors")
    if record.error is not None:
        changes.append(f"error {record.error:.1e}" if record.error else "same result")
    matched = f"{len(record.matched)} matched, {len(record.skipped)} skipped"
    yield f"{record.name:<12} {matched:<23} {', '.join(changes):<52} {record.seconds:5.1f} s"
    for text in record.notes:
        yield f"{'':<12} {text}"
    for entry in record.skipped[:3]:
        yield f"{'':<12} skipped {entry['node']}: {entry['reason']}"
    if len(record.skipped) > 3:
        yield f"{'':<12} ... and {len(record.skipped) - 3} more (report.json has them)"


def _summary(compiled: CompiledModel, out: Path) -> dict[str, Any]:
    size = compiled.size(out)
    return {
        "out": str(out),
        "size": size,
        "metrics": compiled.about["metrics"],
        "lowered": {"backend": compiled.lowered.backend.name, "fused": len(compiled.lowered.fused),
                    "kept": compiled.lowered.kept},
        "worst_block": (compiled.report["numerics"] or [None])[0],
    }  # fmt: skip


def _say_summary(summary: dict[str, Any]) -> None:
    size, metrics, lowered = summary["size"], summary["metrics"], summary["lowered"]
    kept = f"{len(lowered['kept'])} kept in float"
    output.say(f"\nlowered      {lowered['fused']} calls to {lowered['backend']}, {kept}")
    output.say(
        f"size         {output.megabytes(size['model.safetensors'])}, "
        f"{size['ratio']:.3f} of {output.megabytes(size['float_bytes'])} at 16 bit"
    )
    if metrics.get("probe_signal_to_noise_db") is not None:
        worst = summary["worst_block"]
        output.say(
            f"probe        logits {metrics['probe_signal_to_noise_db']:.1f} dB over the noise, "
            f"top-1 agreement {100 * metrics['probe_top1_agreement']:.1f} %, "
            f"worst block {worst['block']} ({worst['output']:.1f} dB)"
        )
    output.say(f"wrote        {summary['out']}")
