"""An artefact as one program of torch.export, for the formats that are made of it.

The graph is the one lowered for `reference`. All its operators are torch's and those of
`ssmc.ops`, so whoever has imported these can run it. States are explicit:
`result, states = program(*inputs, states)`, with the states as a list. (A dict would promise that
its names count, and torch goes by their order.)
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

import ssmc
from ssmc.core import Graph
from ssmc.core.exported import dynamic_extents, export_marked
from ssmc.errors import UsageError
from ssmc.lowering import lower
from ssmc.ops.registry import FLOAT32_MAX
from ssmc.runtime import Artefact
from ssmc.runtime.artefact import TOKENIZER, Kind, write_json
from ssmc.runtime.graph_json import dtype_name

MODEL, DESCRIPTION = "model.pt2", "program.json"
FOLDER = Kind("export", DESCRIPTION, (MODEL, DESCRIPTION, TOKENIZER))


def portable_graph(artefact: Artefact) -> Graph:
    """The graph that is exported, of integer operators as `ssmc.ops` defines them."""
    return lower(artefact.graph, "reference").graph


def export_graph(g: Graph) -> ExportedProgram:
    """`g` as a program of `(*inputs, states)` that gives `(result, states)`, lists of tensors.

    Batch, length and the room of caches are dynamic, each from 1 on. Raises UsageError where
    torch.export finds that one of them is not.
    """
    states = [g.node(spec.name).meta["val"] for spec in g.states]
    operands = (*(g.node(name).meta["val"] for name in g.inputs), states)
    try:
        exported = export_marked(_Program(g), operands)
    except Exception as error:  # what torch raises here is not documented
        raise UsageError(
            f"torch.export cannot express this artefact: {reason(error)}",
            hint="ssmc.load runs the artefact as it is",
        ) from error
    _clean(exported.graph_module)
    return exported


def _clean(module: fx.GraphModule) -> None:
    """Leave out what names this machine, and infinity, which AOTInductor writes and cannot read.

    Of this machine are lines of its files, and assertions of the device that was traced on. Where
    infinity is a bound of float32 values, their largest is as good.
    """
    for node in list(module.graph.nodes):
        node.meta.pop("stack_trace", None)
        node.args = tuple(_finite(value) for value in node.args)
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            module.graph.erase_node(node)
    module.recompile()


def _finite(value: Any) -> Any:
    return FLOAT32_MAX if value == math.inf else value


def reason(error: Exception) -> str:
    """The line of a message that says most: what a compiler complains of, or the first."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line.strip() for line in lines if " error: " in line), lines[0])


class Sink(io.FileIO):
    """A file for torch to write an archive to.

    Where a write fails torch ends the process. Here that is an OSError when the file is closed.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w")
        self._failed: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all bytes, or keep the error."""
        rest = memoryview(data).cast("B")
        try:
            while rest:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self._failed = error
        return len(data)

    def close(self) -> None:
        """Close the file; raises the OSError that a write had."""
        super().close()
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed


class _Program(nn.Module):
    def __init__(self, g: Graph) -> None:
        super().__init__()
        self.program = g.module

    def forward(self, *operands: Any) -> tuple[Any, list[Tensor]]:
        *inputs, states = operands
        result, new = self.program(*inputs, *states)
        return result, list(new)


def write_description(artefact: Artefact, g: Graph, form: str, folder: Path) -> None:
    """Write `program.json`, which says how the program is called, and the tokenizer."""
    about = {
        "format": form,
        "versions": {"ssmc": ssmc.__version__, "torch": torch.__version__},
        "source": artefact.about["source"]["name"],
        "eos": artefact.about.get("eos"),
        "inputs": [_operand(g.node(name)) for name in g.inputs],
        "states": [_operand(g.node(spec.name)) for spec in g.states],
        "result": fx.map_arg(g.result, lambda node: _tensor(node.meta["val"])),
    }
    write_json(folder / DESCRIPTION, about)
    if artefact.tokenizer is not None:
        (folder / TOKENIZER).write_text(artefact.tokenizer, encoding="utf-8")


def _operand(node: fx.Node) -> dict[str, Any]:
    return {"name": node.name} | _tensor(node.meta["val"])


def _tensor(marked: Tensor) -> dict[str, Any]:
    """Shape, with names where it is dynamic, and dtype."""
    shape = [dynamic_extents(marked).get(i, extent) for i, extent in enumerate(marked.shape)]
    return {"shape": shape, "dtype": dtype_name(marked.dtype)}
