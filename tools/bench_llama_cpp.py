"""Speed and peak memory of a compiled model on a CPU beside llama.cpp, in turns, and the ratios.

    python tools/bench_llama_cpp.py ../models/mamba-5m 130m --threads 2

A model is a Hugging Face folder or a published size (random weights). llama.cpp is that
in the source distribution of llama-cpp-python on PyPI, built by gcc and a CMake from PyPI in a
folder of its own (ten minutes at first); it is given the model converted by its own script to
--format, without a vocabulary. Each side runs in processes of its own: a prompt of 512 tokens up to
its last logits, and 128 single steps. The table has the medians over the rounds, and ours over
theirs (memory: the peak of the process, libraries and all).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

VERSION = "0.3.36"  # of llama-cpp-python
PROMPT, TOKENS = 512, 128
OPTIONS = ("AMX_TILE", "AMX_INT8", "AMX_BF16")  # with AMX its quantised models crashed
CONVERT = """
import runpy, sys
sys.path[:0] = [{source!r}, {source!r} + "/gguf-py"]
import conversion
from conversion.base import TextModel
def without_vocabulary(self):
    self._set_vocab_none()
    self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])
found = conversion.get_model_class
def get_model_class(*args, **kwargs):
    made = found(*args, **kwargs)
    made.set_vocab = without_vocabulary
    return made
conversion.get_model_class = get_model_class
sys.argv = ["convert_hf_to_gguf.py", {model!r}, "--outfile", {out!r}, "--outtype", {format!r}]
runpy.run_path({source!r} + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def main() -> None:
    """Build, convert, compile, measure, print."""
    arguments = _arguments()
    if arguments.measure:
        print(json.dumps(_measure(arguments.measure, arguments.threads)))
        return
    if arguments.prepare:
        _prepare(arguments.models[0], arguments.prepare)
        return
    build = arguments.build.resolve()
    program = build_llama_cpp(build)
    for model in arguments.models:
        name = Path(model).name
        random = not Path(model).is_dir()
        folder = build / "models" / name if random else Path(model).resolve()
        artefact = build / "models" / f"{name}-int8"
        if not artefact.exists():  # in another process: a child's peak begins with its parent's
            _run(sys.executable, __file__, model, "--prepare", artefact)
        gguf = _convert(folder, build, arguments.format)
        _compare(model, program, gguf, artefact, arguments)


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--format", default="q8_0", help="f32, f16 or q8_0")
    parser.add_argument("--build", type=Path, default=Path("build/llama.cpp"))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def build_llama_cpp(build: Path) -> Path:
    """The program llama-bench in the folder `build`, built there unless it is there."""
    program = build / "cmake" / "bin" / "llama-bench"
    if program.exists():
        return program
    environment, scripts = build / "venv", build / "venv" / "bin"
    if not environment.exists():
        venv.create(environment, with_pip=True)
    pip = (scripts / "pip", "--quiet")
    _run(*pip, "install", "cmake", "scikit-build-core")
    source = f"llama-cpp-python=={VERSION}"
    flags = ("--no-deps", "--no-build-isolation", "--no-binary", "llama-cpp-python")
    _run(*pip, "download", *flags, "--dest", build, source)
    _run("tar", "-xf", build / f"llama_cpp_python-{VERSION}.tar.gz", "-C", build)
    off = ("CURL", "OPENSSL", "BUILD_TESTS", "BUILD_SERVER", "BUILD_EXAMPLES")
    _run(
        scripts / "cmake", "-S", _source(build), "-B", build / "cmake", "-DGGML_NATIVE=ON",
        "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF",
        *(f"-DLLAMA_{name}=OFF" for name in off), *(f"-DGGML_{name}=OFF" for name in OPTIONS),
    )  # fmt: skip
    target = ("--target", "llama-bench", "--parallel", str(os.cpu_count()))
    _run(scripts / "cmake", "--build", build / "cmake", *target)
    return program


def _source(build: Path) -> Path:
    return build / f"llama_cpp_python-{VERSION}" / "vendor" / "llama.cpp"


def _run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)


def _prepare(model: str, artefact: Path) -> None:
    """Compile a model; one of a published size is written as a Hugging Face folder first."""
    import torch

    import ssmc
    from ssmc.bench.random_model import compile_random, random_recipe
    from ssmc.bench.sizes import find_size

    if Path(model).is_dir():
        ssmc.compile(model, samples=16, length=256).save(artefact)
        return
    size, recipe = find_size(model), random_recipe("w8a8", None, "cpu", 0)
    torch.manual_seed(0)
    size.module("cpu").save_pretrained(artefact.parent / model)  # type: ignore[operator]
    compile_random(size, recipe, torch.device("cpu")).save(artefact)


def _convert(folder: Path, build: Path, format: str) -> Path:
    out = build / "models" / f"{folder.name}-{format}.gguf"
    if not out.exists():
        names = {"source": str(_source(build)), "model": str(folder), "out": str(out)}
        _run(sys.executable, "-c", CONVERT.format(**names, format=format))
    return out


def _compare(model: str, program: Path, gguf: Path, artefact: Path, arguments: Any) -> None:
    theirs: list[dict[str, float]] = []
    ours: list[dict[str, float]] = []
    for _ in range(arguments.rounds):
        theirs.append(_their_run(program, gguf, arguments.threads))
        command = (sys.executable, __file__, "--measure", artefact, "--threads", arguments.threads)
        output, memory = _measured(*command)
        ours.append(json.loads(output) | {"memory": memory})
    print(f"{model}, {arguments.threads} threads, medians of {arguments.rounds} rounds")
    print(f"{'':24}{'ssmc int8':>12}{'llama.cpp ' + arguments.format:>18}{'ratio':>8}")
    units = {"prefill": "prefill, tok/s", "decode": "decode, tok/s", "memory": "peak memory, MB"}
    for key, unit in units.items():
        one, other = (statistics.median(run[key] for run in runs) for runs in (ours, theirs))
        print(f"{unit:24}{one:12.0f}{other:18.0f}{one / other:8.2f}", flush=True)


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


def _measure(artefact: str, threads: int) -> dict[str, float]:
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

    prompt()
    step()
    return {"prefill": PROMPT / _median(prompt, 5), "decode": 1 / _median(step, TOKENS)}


def _median(run: Any, count: int) -> float:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
