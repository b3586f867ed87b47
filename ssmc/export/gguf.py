"""The format `gguf`: one file with the model's weights, which llama.cpp runs.

The weights are those of the compiled graph: with the norms and rotations that are folded into them,
without what happens at run time, which is turned back (`ssmc/export/checkpoint.py`), and rounded
where the artefact rounds them. llama.cpp multiplies them with activations of its own format, so a
float model is what it is meant for. Types are those of llama.cpp's own conversion: matrices get the
one that was asked for, the rest stays float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmc.errors import UsageError
from ssmc.export import Exported
from ssmc.export.checkpoint import Checkpoint, read_checkpoint
from ssmc.export.gguf_fields import Fields
from ssmc.export.gguf_models import architecture, named
from ssmc.export.gguf_vocabulary import vocabulary
from ssmc.runtime import Artefact
from ssmc.runtime.artefact import whole_file

MAGIC = b"GGUF"
FLOAT, HALF, EIGHT = "f32", "f16", "q8_0"
FILE_TYPES = {EIGHT: "MOSTLY_Q8_0", HALF: "MOSTLY_F16", FLOAT: "ALL_F32"}
BLOCK = 32
"""Columns that share a scale in q8_0."""
WHOLE = ("ffn_gate_inp.weight", "ssm_conv1d.weight", "_norm.weight")
"""How the names of matrices end that stay float32."""


def export(artefact: Artefact, out: Path, *, force: bool = False, type: str = EIGHT) -> Exported:
    """Write the model to the file `out`, matrices in `type` (q8_0, f16, f32), whole or not at all.

    Raises UsageError for a model that is not transformers', where `out` is taken, and where the
    package gguf is missing; UnsupportedError for a model that llama.cpp cannot express.
    """
    package = _package()
    found = read_checkpoint(artefact)
    made = architecture(found)
    config = found.skeleton.config
    words = vocabulary(artefact, config.vocab_size)
    fields = {
        "general.name": artefact.about["source"]["name"],
        "general.file_type": int(package.LlamaFileType[FILE_TYPES[type]]),
        "general.quantization_version": package.GGML_QUANT_VERSION,
        f"{made.name}.vocab_size": config.vocab_size,
        **{f"{made.name}.{name}": value for name, value in made.fields(config).items()},
        **words.fields,
    }
    types = {name: stored_type(name, value, type) for name, value in named(made, found)}
    with whole_file(out, MAGIC, force=force) as part:
        writer = package.GGUFWriter(part, made.name)
        _describe(writer, fields)
        for name, value in named(made, found):
            _add(package, writer, name, value, types[name])
        _write(writer)
    kept = {
        name: f"rows of {EIGHT} are multiples of {BLOCK}"
        for name, chosen in types.items()
        if chosen == HALF != type
    }
    return Exported(out, kept, [*_rounded(artefact, found), *made.notes(config), *words.notes])


def stored_type(name: str, value: Tensor, asked: str) -> str:
    """The type of a tensor in a file whose matrices are of the type asked for."""
    if value.dim() < 2 or not name.endswith(".weight") or name.endswith(WHOLE):
        return FLOAT
    if asked == EIGHT and value.shape[-1] % BLOCK:
        return HALF
    return asked


def _package() -> Any:
    """The package gguf; UsageError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UsageError(
            "the format gguf needs the package gguf, which is not installed",
            hint="pip install 'ssmc[gguf]'",
        ) from None
    return gguf


def _describe(writer: Any, fields: Fields) -> None:
    kinds: dict[type, Any] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for name, value in fields.items():
        kinds[value.__class__](name, value)


def _add(package: Any, writer: Any, name: str, value: Tensor, chosen: str) -> None:
    kind = package.GGMLQuantizationType[chosen.upper()]
    if chosen == HALF and value.abs().max() > torch.finfo(torch.float16).max:
        raise UsageError(f"{name} has values that f16 cannot hold", hint=f"--type {FLOAT}")
    array = package.quants.quantize(value.contiguous().numpy(), kind)
    writer.add_tensor(name, array, raw_dtype=kind)


def _write(writer: Any) -> None:
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _rounded(artefact: Artefact, found: Checkpoint) -> Iterator[str]:
    """What the artefact rounds and the file cannot."""
    calls = (node for node in artefact.graph.nodes if node.op == "call_function")
    if not any("quantize" in str(node.target) for node in calls):
        return
    integers = len(found.stored) + len(found.kept)
    yield f"{integers} weights are what the artefact's integers stand for"
    yield "activations, states and caches are in llama.cpp's formats, not in the artefact's"
