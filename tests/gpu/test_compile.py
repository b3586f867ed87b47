"""What a compilation takes of a GPU's memory."""

from __future__ import annotations

import gc

import pytest
import torch

from ssmc.bench.sizes import VOCABULARY, Size
from ssmc.compiler import Hooks, Source, compile_source, prepare
from ssmc.frontend import trace
from ssmc.recipe import make_recipe

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
LENGTH = 256


def source(layer: str, windows: int) -> Source:
    """A model with random weights, its layers wide beside its vocabulary."""
    torch.manual_seed(0)
    module = Size("tiny", layer, 512, 3).module("cpu")  # type: ignore[arg-type]
    ids = torch.randint(VOCABULARY, (windows, LENGTH))
    about = {"source": {"kind": "random", "name": "tiny"}}
    return Source(trace(module), about, [(part,) for part in ids.split(8)]).to(CUDA)


def peak(layer: str, windows: int, passes: str) -> int:
    """The most that a compilation takes, in bytes."""
    gc.collect()  # graphs refer to themselves
    recipe = make_recipe(passes=passes, scheme="w4a16", length=LENGTH)
    given = source(layer, windows)
    torch.cuda.reset_peak_memory_stats()
    compile_source(given, recipe, Hooks())
    return torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
@pytest.mark.parametrize("passes", ["hadamard,percentile", "absmax,gptq"])
def test_more_windows_take_no_more(layer: str, passes: str) -> None:
    peak(layer, 16, passes)  # kernels are compiled, and cuBLAS makes itself room
    few, many = (peak(layer, windows, passes) for windows in (16, 128))
    ids = (128 - 16) * LENGTH * 8
    assert many <= few + ids + 2**20


def test_ranges_are_those_of_the_host() -> None:
    ranges = []
    for device in ("cuda", "cpu"):
        given = source("Mamba1", 24)
        if device == "cpu":
            given.to(torch.device("cpu"))
        prepared = prepare(given, make_recipe(passes="absmax", length=LENGTH), Hooks())
        ranges.append({n: o.channel() for n, o in prepared.source.graph.ranges.items()})
    for name, found in ranges[0].items():
        torch.testing.assert_close(found, ranges[1][name], rtol=1e-3, atol=1e-4)
