"""Time of each kernel for CPUs beside its floor, as a tape of decoding or a prompt launches it.

    python tools/bench_cpu_kernels.py --threads 2
    python tools/bench_cpu_kernels.py --threads 1 --step OUT

The floor is the larger of two times: bytes over what a product of one row reads from the cache a
second, and operations on floats over what torch's matrix product does a second, both measured
first; exponentials are not counted. The operands of a call are those of the one before, and so in
the cache. A time is the tenth percentile of 60 runs of a tape that has a call twenty times (of a
prompt: once). With --step it takes apart a step of an artefact behind 512 tokens instead: how often
each kernel is launched, and what that takes in all.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # as `ssmc` has it, before torch loads

import torch

from ssmc.kernels.cpu.launch import Tape
from ssmc.kernels.cpu.threads import Entries, threads
from ssmc.lowering.backends.cpu import COMPILED
from ssmc.ops import quantize_dynamic
from ssmc.quant.formats import bf16_up, quantize_weight
from ssmc.runtime import load

RUNS, REPEATED, PROMPT = 60, 20, 512


@dataclass(frozen=True)
class Case:
    """A call of an operator; what it has to read and to write, and its products of floats."""

    label: str
    operator: str
    args: tuple[Any, ...]
    bytes: int
    flops: int = 0
    prompt: bool = False


def main() -> None:
    """Measure the two rates, then each case."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--step", metavar="OUT", help="an artefact, compiled for the CPU")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.step:
        _take_apart(arguments.step)
    else:
        _measure_cases()


def _take_apart(artefact: str) -> None:
    """The launches of a step by kernel; each is repeated by itself, so its operands are near."""
    session = load(artefact, "cpu", "cpu").session(1)
    session.prefill(torch.ones(1, PROMPT, dtype=torch.int64))
    token = torch.ones(1, 1, dtype=torch.int64)
    session.step(token)
    tape = session._recordings[1].tape  # type: ignore[union-attr]
    launches = [entry for part in tape.parts if isinstance(part, list) for entry in part]
    times, counts = defaultdict[str, float](float), Counter[str]()
    for entry, kept in zip(launches, tape.kept, strict=True):
        name, repeated = kept[0].function.__name__, Entries([entry] * REPEATED)
        counts[name] += 1
        times[name] += _best(lambda entries=repeated: threads().run(entries)) / REPEATED  # type: ignore[misc]
        session.reset()
        session.states.get("position", token).fill_(PROMPT)
    for name in sorted(times, key=times.__getitem__, reverse=True):
        print(f"{1e6 * times[name]:8.1f} us {counts[name]:4d} x {name}")
    calls = len(tape.parts) - sum(isinstance(part, list) for part in tape.parts)
    print(
        f"{1e6 * sum(times.values()):8.1f} us {len(launches):4d} launches, {calls} calls of torch"
    )
    print(f"{1e6 * _best(lambda: session.step(token)):8.1f} us the step")


def _measure_cases() -> None:
    kernels = COMPILED.load()
    width, rows = 1024, 512  # half a megabyte
    weight = (*quantize_weight(torch.randn(rows, width)), None)
    row = quantize_dynamic(torch.randn(1, width))
    bandwidth = rows * width / _time(kernels["ssmc::int8_linear"], (*row, *weight), REPEATED)
    square = torch.randn(1024, 1024)
    rate = 2 * 1024**3 / _best(lambda: square @ square)
    print(f"{bandwidth / 1e9:.0f} GB/s, {rate / 1e9:.0f} GFLOP/s\n")
    print("| kernel | floor, us | reached, us |\n| --- | ---: | ---: |")
    for case in cases():
        run = kernels[f"ssmc::{case.operator}"]
        seconds = _time(run, case.args, 1 if case.prompt else REPEATED)
        floor = max(case.bytes / bandwidth, case.flops / rate)
        print(f"| {case.label} | {1e6 * floor:.1f} | {1e6 * seconds:.1f} |", flush=True)


def cases() -> Iterator[Case]:
    """At the sizes of jamba-11m and llama-6m."""
    yield from _attention()
    yield from _mlps()
    yield from _experts()
    yield _scan_step()


def _attention() -> Iterator[Case]:
    heads, groups, n, room = 4, 2, 64, 512
    caches = torch.randn(2, 1, room, groups, n)
    last, first = torch.tensor([room - 1]), torch.tensor([0])
    one, prompt = torch.randn(1, 1, heads, n), torch.randn(1, room, heads, n)
    k, v = (quantize_dynamic(cache) for cache in caches)
    size, flops = 2 * room * groups * n, 4 * room * heads * n
    yield Case("attention, one token, 512 rows of float32", "attention", (one, *caches, last),
               4 * size, flops)  # fmt: skip
    yield Case("attention, one token, 512 rows of int8", "int8_attention", (one, *k, *v, last),
               size + 8 * room * groups, flops)  # fmt: skip
    given = (prompt, *caches, first)
    yield Case("attention, a prompt of 512", "attention", given, 4 * size, flops * room // 2, True)
    frequencies = torch.rand(n // 2)
    yield Case("rotation of queries, one token", "rotary_embedding", (one, frequencies, last),
               8 * one.numel())  # fmt: skip


def _mlps() -> Iterator[Case]:
    for n, block in ((384, 384), (640, 640)):
        gate, up = torch.randn(2, 1, 1, n)
        label = f"gate, rotated and rounded, {n} channels"
        yield Case(label, "silu_mul_quantize", (gate, up, block), 9 * n)


def _experts() -> Iterator[Case]:
    experts, k, d, inner = 4, 2, 256, 384
    index, weights = torch.tensor([[[2, 0]]]), torch.rand(1, 1, k)
    yield Case("router of 4 experts", "softmax_top_k", (torch.randn(1, 1, experts), k), 64)
    up, up_scale = _stacked(experts, 2 * inner, d)
    down, down_scale = _stacked(experts, d, inner)
    x, each = quantize_dynamic(torch.randn(1, 1, d)), quantize_dynamic(torch.randn(1, 1, k, inner))
    yield Case("experts, 2 of 4, 768 x 256", "int8_expert_linear", (*x, up, up_scale, index),
               k * up[0].numel())  # fmt: skip
    yield Case("experts, 2 of 4, 256 x 384, summed", "int8_expert_linear_sum",
               (*each, down, down_scale, index, weights), k * down[0].numel())  # fmt: skip


def _stacked(experts: int, n: int, k: int) -> list[torch.Tensor]:
    """Weights of experts and their scales."""
    return [t.unflatten(0, (experts, n)) for t in quantize_weight(torch.randn(experts * n, k))]


def _scan_step() -> Case:
    width, rank, low = 512, 16, 16
    dt_proj = (*quantize_weight(torch.randn(width, low)), None, bf16_up(torch.rand(width) + 0.1))
    u, scale = torch.randint(-127, 128, (1, 1, width)).char(), bf16_up(torch.rand(width))
    A, state, x_proj = (
        torch.rand(*shape) for shape in ((width, rank), (1, width, rank), (1, 1, 48))
    )
    scan = (u, scale, -A, torch.rand(width), u, scale, torch.rand(width), state, True)
    args = (x_proj, None, None, None, 1e-6, *dt_proj, *scan)
    size = width * (low + 12 * rank + 30)
    return Case("norms, dt_proj, scan step", "normed_selective_scan_step", args, size)


def _time(run: Callable[..., Any], args: tuple[Any, ...], repeated: int) -> float:
    """Seconds of a call."""
    with Tape() as tape:
        for _ in range(repeated):
            run(*args)
    return _best(tape.run) / repeated


def _best(run: Callable[[], object]) -> float:
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times)[RUNS // 10]


if __name__ == "__main__":
    main()
