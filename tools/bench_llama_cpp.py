"""Speed, peak memory and perplexity of a compiled model on a CPU beside llama.cpp, in turns.

    python tools/bench_llama_cpp.py ../models/mamba-5m 130m --threads 2

A model is a Hugging Face folder or a published size (random weights). llama.cpp is built by
tools/llama_cpp_build.py; it is given what `ssmc export --format gguf --type TYPE` writes of the
float model. Ours runs as a session in a process with torch, and as what `ssmc export --format
native` writes, in one without. Each runs in processes of its own: a prompt of 512 tokens up to its
last logits, and 128 single steps. The table has the medians over the rounds, and ours over theirs
(memory: the peak of the process, libraries and all). Where the model has a tokenizer, the last line
is perplexity, on 16 windows of the embedded text.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_cpp_build import LlamaCpp, build_llama_cpp, run

from ssmc.native.model import is_program

PROMPT, TOKENS, WINDOWS = 512, 128, 16


def main() -> None:
    """Build, convert, compile, measure, print."""
    arguments = _arguments()
    if arguments.measure:
        measure = _measure_native if is_program(arguments.measure) else _measure_session
        print(json.dumps(measure(arguments.measure, arguments.threads)))
        return
    if arguments.prepare:
        _prepare(arguments.models[0], arguments.prepare, arguments)
        return
    built = build_llama_cpp(arguments.build)
    for model in arguments.models:
        folder = built.folder / "models" / Path(model).name
        if not _scores(folder, arguments.type).exists():
            # In another process: a child's peak begins with its parent's.
            words = ("--type", arguments.type, "--build", built.folder)
            run(sys.executable, __file__, model, "--prepare", folder, *words)
        _compare(model, built, folder, arguments)


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--type", default="q8_0", help="llama.cpp's: f32, f16 or q8_0")
    parser.add_argument("--build", type=Path, default=Path("build/llama.cpp"))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _artefact(folder: Path) -> Path:
    return folder / "int8"


def _program(folder: Path) -> Path:
    return folder / "native"


def _file(folder: Path, type: str) -> Path:
    return folder / f"float-{type}.gguf"


def _scores(folder: Path, type: str) -> Path:
    """Perplexities, the last thing that is prepared of a model."""
    return folder / f"perplexity-{type}.json"


def _prepare(model: str, folder: Path, arguments: Any) -> None:
    """Compile a model in int8, and in float for the file that llama.cpp gets; score both."""
    import torch
    from perplexity_llama_cpp import cut, our_perplexity, their_reading

    import ssmc
    from ssmc.bench.random_model import compile_random, random_recipe
    from ssmc.bench.sizes import find_size
    from ssmc.export import export

    exact: dict[str, Any] = {"passes": "", "scheme": "none"}
    if Path(model).is_dir():
        int8 = ssmc.compile(model, samples=16, length=256)
        plain = ssmc.compile(model, samples=1, length=64, **exact)
    else:
        size, recipe = find_size(model), random_recipe("w8a8", None, "cpu", 0)
        torch.manual_seed(0)
        int8 = compile_random(size, recipe, torch.device("cpu"))
        ids = torch.zeros(1, 8, dtype=torch.int64)
        plain = ssmc.compile(size.module("cpu"), ids, calibration=ids, **exact)
    int8.save(_artefact(folder), force=True)
    export(_artefact(folder), _program(folder), "native", force=True)
    plain.save(folder / "float", force=True)
    file = _file(folder, arguments.type)
    export(folder / "float", file, "gguf", type=arguments.type, force=True)
    scores = {}
    if int8.tokenizer is not None:
        text = cut(int8, None, WINDOWS)
        theirs, _ = their_reading(build_llama_cpp(arguments.build), file, text, arguments.threads)
        scores = {"ssmc": our_perplexity(int8, text), "llama.cpp": theirs}
    _scores(folder, arguments.type).write_text(json.dumps(scores))


def _compare(model: str, built: LlamaCpp, folder: Path, arguments: Any) -> None:
    file, threads = _file(folder, arguments.type), arguments.threads
    theirs: list[dict[str, float]] = []
    ours: dict[Path, list[dict[str, float]]] = {_artefact(folder): [], _program(folder): []}
    for _ in range(arguments.rounds):
        theirs.append(_their_run(built.bench, file, threads))
        for given, found in ours.items():
            command = (sys.executable, __file__, "--measure", given, "--threads", threads)
            output, memory = _measured(*command)
            found.append(json.loads(output) | {"memory": memory})
    print(f"{model}, {threads} threads, medians of {arguments.rounds} rounds")
    heads = ("session", "ratio", "native", "ratio")
    print(f"{'':24}{'llama.cpp ' + arguments.type:>18}" + "".join(f"{h:>10}" for h in heads))
    units = {"prefill": "prefill, tok/s", "decode": "decode, tok/s", "memory": "peak memory, MB"}
    for key, unit in units.items():
        other = statistics.median(run[key] for run in theirs)
        line = f"{unit:24}{other:18.0f}"
        for runs in ours.values():
            one = statistics.median(run[key] for run in runs)
            line += f"{one:10.0f}{one / other:10.2f}"
        print(line, flush=True)
    scores = json.loads(_scores(folder, arguments.type).read_text())
    if scores:
        one, other = scores["ssmc"], scores["llama.cpp"]
        print(f"{'perplexity':24}{other:18.3f}{one:10.3f}{one / other:10.4f}", flush=True)


def _their_run(program: Path, gguf: Path, threads: int) -> dict[str, float]:
    sizes = ("-p", PROMPT, "-n", TOKENS, "-r", 2)
    output, memory = _measured(program, "-m", gguf, "-t", threads, *sizes, "-o", "json")
    found = {
        "prefill" if run["n_prompt"] else "decode": run["avg_ts"] for run in json.loads(output)
    }
    return found | {"memory": memory}


def _measured(*command: Any) -> tuple[str, float]:
    """What a process prints, and its peak memory in MB."""
    read, write = os.pipe()
    process = subprocess.Popen([str(part) for part in command], stdout=write, stderr=None)
    os.close(write)
    with os.fdopen(read) as pipe:
        output = pipe.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[0]} ended with {process.returncode}")
    return output, usage.ru_maxrss / 1024


def _measure_session(artefact: str, threads: int) -> dict[str, float]:
    """Tokens a second of an artefact: a prompt, and steps behind it."""
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # as `ssmc` has it, before torch loads
    import torch

    from ssmc.runtime import load

    torch.set_num_threads(threads)
    model = load(artefact, "cpu", "cpu")
    session = model.session(1)
    ids = torch.randint(0, model.graph.result.meta["val"].shape[-1], (1, PROMPT))

    def prompt() -> None:
        session.reset()
        session.prefill(ids)

    def step() -> None:
        session.step(ids[:, :1])

    return _speeds(prompt, step)


def _measure_native(folder: str, threads: int) -> dict[str, float]:
    """The same of a native program."""
    from ssmc.native import load

    model, draw = load(folder, threads), random.Random(0)
    ids = [draw.randrange(model.vocabulary) for _ in range(PROMPT)]

    def prompt() -> None:
        model.reset()
        model.prefill(ids)

    return _speeds(prompt, lambda: model.step(ids[0]))


def _speeds(prompt: Callable[[], object], step: Callable[[], object]) -> dict[str, float]:
    prompt()
    step()
    return {"prefill": PROMPT / _median(prompt, 5), "decode": 1 / _median(step, TOKENS)}


def _median(run: Callable[[], object], count: int) -> float:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
