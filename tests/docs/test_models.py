"""The table in docs/models.md is what this test finds; with SSMC_WRITE=1 it is written anew."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from frontend.models import SHAPES, build, error, logits, tokens
from lowering.rules import RULES
from tiny import compile_tiny
from torch import nn

from ssmc.core import Graph
from ssmc.core.dialect import target_name
from ssmc.errors import UnsupportedError
from ssmc.frontend import trace
from ssmc.lowering import Backend, lower
from ssmc.lowering.backends.triton import KERNELS
from ssmc.runtime import Artefact, CompiledModel
from ssmc.runtime.verify import verify

from .blocks import ROOT

PAGE = ROOT / "docs" / "models.md"
MODELS = {
    "Mamba": "mamba",
    "FalconMamba": "falcon",
    "Mamba-2": "mamba2-groups",
    "Jamba": "jamba",
    "Bamba": "bamba",
    "GraniteMoeHybrid": "granite",
    "NemotronH": "nemotron",
    "NemotronH with experts": "nemotron-experts",
    "FalconH1": "falcon-h1",
    "Llama": "llama",
    "Qwen3": "qwen3",
    "Zamba2": "zamba2",
    "Zamba2 with adapters": "zamba2-adapters",
}
HEAD = (
    "| architecture | trace | bf16 | prefill | decode | padding | W8A8 | W4A16 "
    "| without a Triton kernel |"
)
PARTS = {"attention": "int8_attention", "experts": "int8_expert_linear"}
EIGHT = "hadamard,percentile,quantise,kv-cache"
FOUR = "hadamard,absmax,quantise{weights=4,group=8,activations=16},gptq"


@pytest.mark.slow
def test_the_table_is_what_the_models_do() -> None:
    found = [HEAD, "| --- " * 9 + "|", *(_row(name, kind) for name, kind in MODELS.items())]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(HEAD)
    after = rest.partition("\n\n")[2]
    page = before + "\n".join(found) + "\n\n" + after
    if os.environ.get("SSMC_WRITE") == "1":
        PAGE.write_text(page, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page


def _row(name: str, kind: str) -> str:
    try:
        graph = trace(build(kind))
    except UnsupportedError:
        return f"| {name} |" + " no |" * 7 + " |"
    model, compiled = build(kind), compile_tiny(kind, EIGHT)
    checks = [
        _traces(model, graph),
        _traces_in_16_bits(kind),
        _prefills(model, graph),
        _decodes(model, graph),
        _pads(model, graph),
        _agrees(compiled),
        _agrees(compile_tiny(kind, FOUR)),
    ]
    cells = ["yes" if check else "no" for check in checks]
    return f"| {name} | {' | '.join(cells)} | {', '.join(_without_kernel(compiled)) or 'none'} |"


def _traces(model: nn.Module, graph: Graph) -> bool:
    return all(
        error(graph(ids)[0], logits(model, ids)) < 1e-5 for ids in (tokens(*s) for s in SHAPES)
    )


def _traces_in_16_bits(kind: str) -> bool:
    """Against the eager model in float32 with the weights that bfloat16 leaves."""
    graph, ids = trace(build(kind).bfloat16()), tokens(2, 17)
    return error(graph(ids)[0], logits(build(kind).bfloat16().float(), ids)) < 1e-5


def _pads(model: nn.Module, graph: Graph) -> bool:
    """Rows padded on the left against each alone, and the tokens that follow."""
    compiled = CompiledModel(Artefact(graph), "reference")
    ids, lengths = tokens(3, 9), (9, 2, 6)
    mask = torch.tensor([[0] * (9 - n) + [1] * n for n in lengths])
    found, following = (
        compiled(ids, attention_mask=mask)[0],
        compiled.generate(ids, 3, attention_mask=mask)[:, 9:],
    )
    for row, length in enumerate(lengths):
        alone = ids[row : row + 1, -length:]
        if error(found[row : row + 1, -length:], logits(model, alone)) >= 1e-5:
            return False
        for token in following[row]:
            if logits(model, alone)[0, -1].argmax() != token:
                return False
            alone = torch.cat([alone, token.view(1, 1)], 1)
    return True


def _prefills(model: nn.Module, graph: Graph) -> bool:
    ids, outputs, states = tokens(2, 20), [], None
    for part in ids.split([9, 1, 10], 1):
        output, states = graph(part, states=states)
        outputs.append(output)
    return error(torch.cat(outputs, 1), logits(model, ids)) < 1e-5


def _decodes(model: nn.Module, graph: Graph) -> bool:
    ids = tokens(2, 8)
    result, states = graph(ids)
    for _ in range(12):
        wanted = logits(model, ids)[:, -1:].argmax(-1)
        if not torch.equal(result[:, -1:].argmax(-1), wanted):
            return False
        ids = torch.cat([ids, wanted], 1)
        result, states = graph(wanted, states=states)
    return True


def _agrees(compiled: CompiledModel) -> bool:
    found = verify(compiled, tokens(2, 12))
    return bool(found) and all(comparison.agrees for comparison in found)


def _without_kernel(compiled: CompiledModel) -> Iterator[str]:
    kernels: dict[str, Any] = {f"ssmc::{n}": n for names in KERNELS.values() for n in names}
    backend = Backend("triton", rules=RULES.rules, complete=True)
    called = {
        target_name(n.target)
        for n in lower(compiled.graph, backend).graph.nodes
        if n.op == "call_function"
    }
    for part, operator in PARTS.items():
        if f"ssmc::{operator}" in called - set(kernels):
            yield part
