"""What each kernel of a layer adds to the time of a model, on a CUDA device.

    python tools/model_timeline.py 2.8b [--scheme w8a8] [--passes LIST] [--batch N] [--length N]

Kernels overlap: one starts, and loads what is constant, while those in front are at work. So the
time between its start and its end says little; by how much later the chain ends because of it is
the time from the end of the kernel in front to its own. A model with random weights takes one step
(--length 1) or a prompt, replayed from CUDA graphs; the layers' medians are printed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ssmc.bench.random_model import compile_random, random_recipe
from ssmc.bench.sizes import SIZES, VOCABULARY
from ssmc.device import running_on
from ssmc.runtime import CompiledModel

RUNS = 3


@dataclass(frozen=True)
class Span:
    """When a kernel ran, in microseconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Row:
    """A kernel of a layer: microseconds it ran, and by how many the chain ends later."""

    name: str
    ran: float
    added: float


def period(names: Sequence[str]) -> int:
    """How many kernels a layer has: the distance at which most names repeat, the least of these."""

    def repeats(distance: int) -> int:
        return sum(a == b for a, b in zip(names, names[distance:], strict=False))

    # What comes before and behind the layers is not repeated, so not every name can be.
    return max(range(1, len(names) // 2 + 1), key=lambda d: (repeats(d) / (len(names) - d), -d))


def rows(spans: Sequence[Span]) -> list[Row]:
    """The kernels of a layer, as medians over the layers, from those of one run in order."""
    count = period([s.name for s in spans])
    names = [s.name for s in spans]
    first = next(i for i in range(len(names)) if names[i : i + count] == names[i + count :][:count])
    layers = range(first + 1, len(spans), count)  # a kernel is in front of each
    found = []
    for place in range(count):
        name = names[first + 1 + place]
        at = [i + place for i in layers if i + place < len(spans) and names[i + place] == name]
        ran = statistics.median(spans[i].end - spans[i].start for i in at)
        added = statistics.median(spans[i].end - spans[i - 1].end for i in at)
        found.append(Row(name, ran, added))
    return found


def record(model: CompiledModel, batch: int, length: int) -> list[Span]:
    """The kernels of one run of `length` tokens of `batch` sequences, in order of their starts."""
    session = model.session(batch)
    ids = torch.randint(0, VOCABULARY, (batch, length), device=model.device)
    for _ in range(RUNS):
        session.prefill(ids)
    torch.cuda.synchronize(model.device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(RUNS):
            session.prefill(ids)
        torch.cuda.synchronize(model.device)
    spans = [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type.name == "CUDA"
    ]
    spans.sort(key=lambda span: (span.start, span.end))
    count = len(spans) // RUNS
    return spans[-count:]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("size", choices=sorted(SIZES), help="a published size")
    parser.add_argument("--scheme", default="w8a8", help="as in ssmc compile")
    parser.add_argument("--passes", help="as in ssmc compile; the usual ones if not given")
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--length", type=int, default=1, help="tokens; 1 is a step of decoding")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("there is no CUDA device", file=sys.stderr)
        return 4
    device = torch.device("cuda")
    with running_on(device), torch.no_grad():
        recipe = random_recipe(options.scheme, options.passes, "triton", 0)
        model = compile_random(SIZES[options.size], recipe, device)
        spans = record(model, options.batch, options.length)
    for row in rows(spans):
        print(f"{row.name[:48]:48} ran {row.ran:8.2f} us   adds {row.added:8.2f} us")
    print(f"{len(spans)} kernels in {spans[-1].end - spans[0].start:.0f} us")
    return 0


if __name__ == "__main__":
    sys.exit(main())
