"""Time and memory of a compilation on a GPU: a model of a published size with random weights.

    python tools/bench_compile.py 130m 1.4b 2.8b
    torchrun --standalone --nproc-per-node 2 tools/bench_compile.py 2.8b

compiles each as `ssmc compile` does, checks and statistics included, on 512 windows of 512 random
tokens, and prints the seconds of the passes that take long and the peak of the device's memory, of
the calibration and of all, as a multiple of the model's size at 16 bits. Tracing and the drawing of
weights come before and are told apart.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time

import torch

from ssmc.bench.sizes import VOCABULARY, find_size
from ssmc.compiler import CALIBRATION_BATCH, Hooks, Source, compile_source
from ssmc.core import Graph, Record
from ssmc.core.ranks import join
from ssmc.device import find_device
from ssmc.frontend import trace
from ssmc.recipe import make_recipe


def measure(
    name: str, passes: str, scheme: str | None, samples: int, length: int, device: torch.device
) -> list[str]:
    """A line of a table for a size: seconds of each part, and memory."""
    size = find_size(name)
    start = time.perf_counter()
    torch.manual_seed(0)  # all processes draw the same weights
    graph = trace(size.module(device).cpu())
    float_bytes = 2 * sum(t.numel() for t in graph.params().values())
    traced = time.perf_counter() - start
    ids = torch.randint(
        0, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(0)
    )
    batches: list[tuple[torch.Tensor, ...]] = [(b,) for b in ids.split(CALIBRATION_BATCH)]
    about = {"source": {"kind": "random", "name": size.name}}
    options = {} if scheme is None else {"scheme": scheme}
    recipe = make_recipe(passes=passes, samples=samples, length=length, **options)
    gc.collect()  # the graphs of the size before refer to themselves
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    found: list[tuple[str, float]] = []
    peaks = [0]

    def ended(record: Record, _: Graph) -> None:
        found.append((record.name, record.seconds))
        if device.type == "cuda" and record.stage == "calibrate":
            peaks[0] = torch.cuda.max_memory_allocated(device)

    hooks = Hooks(on_pass=ended)
    compiled = compile_source(Source(graph, about, batches).to(device), recipe, hooks)
    whole = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    slow = ", ".join(f"{n} {s:.1f}" for n, s in found if s >= 0.05 * whole)
    ratios = [f"{bytes_ / float_bytes:.2f}" if peak else "-" for bytes_ in (*peaks, peak)]
    return [
        compiled.about["source"]["name"], f"{traced:.1f}", f"{whole:.1f}",
        f"{float_bytes / 1e9:.2f}", *ratios, slow,
    ]  # fmt: skip


def main() -> None:
    """Measure each size that is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sizes", nargs="+", help="130m to 2.8b, mamba2-130m to mamba2-2.7b")
    parser.add_argument("--passes", default="hadamard,percentile")
    parser.add_argument("--scheme")
    parser.add_argument("--samples", type=int, default=512, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens a window")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    ranks = join()
    device = find_device(given.device)
    if ranks.number:  # one of them prints
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    print("| size | traced s | compiled s | at 16 bits GB | calibrating | peak | passes s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | --- |")
    for name in given.sizes:
        cells = measure(name, given.passes, given.scheme, given.samples, given.length, device)
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
