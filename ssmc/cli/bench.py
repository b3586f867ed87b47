"""`ssmc bench`."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ssmc.cli import completion, output

if TYPE_CHECKING:
    import torch

    from ssmc.bench.report import Report
    from ssmc.bench.sizes import Size
    from ssmc.bench.subjects import Subject
    from ssmc.recipe import Recipe


def run(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TARGET...",
            help="Models or artefacts; none with --random-weights.",
            autocompletion=completion.target,
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="mamba-ssm, hf, or another model or artefact.",
            autocompletion=completion.target_or("mamba-ssm", "hf"),
        ),
    ] = None,
    ttft: Annotated[str | None, typer.Option(help="Prompts to time the first token of.")] = None,
    tpot: Annotated[bool, typer.Option("--tpot", help="Time a token of decoding.")] = False,
    ttlt: Annotated[
        str | None, typer.Option(help="Prompts and tokens to time the last token of: 512+512.")
    ] = None,
    size: Annotated[bool, typer.Option("--size", help="Bytes of the weights only.")] = False,
    batch: Annotated[str, typer.Option(help="Sequences at a time, one or several.")] = "1",
    random_weights: Annotated[
        str | None,
        typer.Option(
            help="A published size instead of TARGET: 130m, mamba2-2.7b.",
            autocompletion=completion.SIZES,
        ),
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            help="Of --random-weights (w8a8, as in ssmc compile).",
            autocompletion=completion.SCHEMES,
        ),
    ] = None,
    passes: Annotated[
        str | None,
        typer.Option(
            help="Of --random-weights (hadamard,percentile).", autocompletion=completion.pass_list
        ),
    ] = None,
    baseline_dtype: Annotated[
        str | None,
        typer.Option(
            help="float16, bfloat16 or float32 (as published).",
            autocompletion=completion.words("float16", "bfloat16", "float32"),
        ),
    ] = None,
    iterations: Annotated[
        int | None, typer.Option("--iterations", "-n", min=1, help="Runs (50; on a CPU 10).")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Relative error of logits above which nothing is timed.")
    ] = 0.3,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the tokens (drawn).")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads on a CPU (as many as it has cores).")
    ] = None,
    backend: Annotated[
        str,
        typer.Option(help="auto, reference, cpu or triton.", autocompletion=completion.BACKENDS),
    ] = "auto",
    device: Annotated[
        str, typer.Option(help="auto, cpu or cuda.", autocompletion=completion.DEVICES)
    ] = "auto",
    plot: Annotated[Path | None, typer.Option(help="Draw the latencies to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Time to the first token, per token and to the last token, and the memory it takes.

    Ends with exit code 1 where the logits of what is timed are not those of the reference.
    """
    import torch

    from ssmc.bench.measure import Plan, measure
    from ssmc.bench.plot import check_plot
    from ssmc.bench.random_model import random_recipe
    from ssmc.bench.report import Report
    from ssmc.device import find_device, running_on

    place = find_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    names = targets or []
    published = _size(random_weights, names) if random_weights is not None else None
    dtype = _checked_baseline(baseline, published, names, baseline_dtype, place)
    if plot is not None:
        check_plot(plot)
    asked = ttft is not None or tpot or ttlt is not None or size
    plan = Plan(
        ttft=_numbers("ttft", ttft if asked else "512"),
        tpot=tpot or not asked,
        ttlt=_pairs(ttlt),
        batches=_numbers("batch", batch),
        n=iterations or (50 if place.type == "cuda" else 10),
        tolerance=tolerance,
    )
    drawn = secrets.randbits(31) if seed is None else seed
    torch.manual_seed(drawn)
    with running_on(place):
        if published is None:
            subjects = _given(names, scheme or passes, backend, place)
        else:
            recipe = random_recipe(scheme or "w8a8", passes, backend, drawn)
            name = " ".join(filter(None, (published.name, recipe.scheme, passes)))
            subjects = [_random(name, published, recipe, place)]
        other = None
        if baseline is not None:
            other = _other(baseline, published, names, dtype, backend, place)
            subjects.append(other)
        with output.progress("measuring") as progress:
            result = measure(subjects, plan, place, progress)
    _show(Report(subjects, plan, result, place, drawn, other), plot, as_json)


def _numbers(option: str, text: str | None) -> list[int]:
    """The numbers of a list such as 512,2048."""
    from ssmc.errors import UsageError

    parts = [part.strip() for part in text.split(",")] if text is not None else []
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--{option} {text} is no list of numbers", hint=f"as in --{option} 1,64")
    return [int(part) for part in dict.fromkeys(parts)]


def _pairs(text: str | None) -> list[tuple[int, int]]:
    """The pairs of a list such as 512+512,128+64."""
    from ssmc.errors import UsageError

    pairs = [part.partition("+") for part in text.split(",")] if text is not None else []
    try:
        found = [(int(prompt), int(tokens)) for prompt, _, tokens in pairs]
    except ValueError:
        found = [(0, 0)]
    if any(min(pair) < 1 for pair in found):
        raise UsageError(f"--ttlt {text} is no prompt and tokens", hint="as in --ttlt 512+512")
    return found


def _size(name: str, targets: list[str]) -> Size:
    from ssmc.bench.sizes import find_size
    from ssmc.errors import UsageError

    if targets:
        raise UsageError(f"--random-weights stands for the target, and {targets[0]} is one, too")
    return find_size(name)


def _given(
    targets: list[str], recipe: str | None, backend: str, device: torch.device
) -> list[Subject]:
    """The targets, models or artefacts."""
    from ssmc.errors import UsageError

    if not targets:
        raise UsageError("no target", hint="give a model, an artefact, or --random-weights SIZE")
    if recipe is not None:
        raise UsageError(
            "--scheme and --passes go with --random-weights", hint="compile the model with them"
        )
    return [_opened(target, backend, device) for target in targets]


def _opened(target: str, backend: str, device: torch.device) -> Subject:
    from ssmc.bench.subjects import Compiled, Traced
    from ssmc.cli.target import open_target

    opened = open_target(target, backend, str(device))
    if opened.compiled is not None:
        return Compiled(target, opened.compiled)
    return Traced(target, opened.run, device)


def _random(name: str, size: Size, recipe: Recipe, device: torch.device) -> Subject:
    from ssmc.bench.random_model import compile_random
    from ssmc.bench.subjects import Compiled

    output.note(f"compiling a random {size.name}")
    return Compiled(name, compile_random(size, recipe, device))


def _checked_baseline(
    name: str | None, size: Size | None, targets: list[str], dtype: str | None, device: torch.device
) -> torch.dtype:
    """Its dtype; what is asked for in vain is refused before anything large is loaded."""
    from ssmc.bench.baselines import find_dtype, mamba_ssm
    from ssmc.errors import UsageError
    from ssmc.runtime import is_artefact

    every = [*targets, name]
    if twice := next((n for n in every if n is not None and every.count(n) > 1), None):
        raise UsageError(f"{twice} is compared with itself", hint="name each model once")
    if name == "mamba-ssm" and size is None:
        raise UsageError(
            "the baseline mamba-ssm is built at a published size",
            hint="give --random-weights SIZE in place of the target",
        )
    if name == "mamba-ssm":
        mamba_ssm(device)
    if name == "hf" and targets and is_artefact(targets[0]):
        raise UsageError(
            "an artefact does not hold the transformers model it was made from",
            hint="name that model: --baseline MODEL",
        )
    return find_dtype(dtype, size, device)


def _other(
    name: str,
    size: Size | None,
    targets: list[str],
    dtype: torch.dtype,
    backend: str,
    device: torch.device,
) -> Subject:
    """The baseline called `name`."""
    from ssmc.bench.baselines import MambaSsm, Transformers
    from ssmc.frontend import load_model

    if name == "mamba-ssm" and size is not None:
        return MambaSsm(size, device, dtype)
    if name == "hf":
        module = size.module(device) if size is not None else load_model(targets[0]).module
        return Transformers(module, device, dtype)
    return _opened(name, backend, device)


def _show(report: Report, plot: Path | None, as_json: bool) -> None:
    """Print and draw; VerifyError where something was wrong."""
    from ssmc.bench import plot as plots
    from ssmc.errors import VerifyError

    if as_json:
        output.say_json(report.to_json())
    else:
        _say(report)
    if plot is not None and report.result.measurements:
        plots.plot(report, plot)
    if report.result.wrong:
        target, workload, error = report.result.wrong[0]
        raise VerifyError(
            f"{target}, batch {workload.batch}, prompt {workload.prompt}: the logits differ from "
            f"the reference's by {error:.1e} (tolerance {report.plan.tolerance:.0e}); not timed",
            hint="`ssmc verify` on the artefact names the operator",
        )


def _say(report: Report) -> None:
    """The measurements, and below them the sizes; of three or more models side by side."""
    from ssmc.bench.report import COLUMNS, peak_memory

    if report.rows():
        output.say_table(COLUMNS, report.rows())
        output.say("")
    if len(report.subjects) > 2:
        output.say_table(*report.comparison())
        return
    for subject in report.subjects:
        output.say(f"weights of {subject.name}   {output.megabytes(subject.weight_bytes)}")
    if report.device.type == "cpu":
        output.say(f"peak memory of this process   {output.megabytes(peak_memory())}")
