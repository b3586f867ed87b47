"""The format `compressed-tensors`: integers of linear layers, the rest in 16 bits.

Read by transformers with the package compressed-tensors, and by vLLM. The layout is that package's:
`int-quantized` has int8 weights [N, K] with a scale a row; `pack-quantized` has fewer bits, eight
integers of 4 in an int32 from the lowest bits up, with a scale a row or a row and group. Inputs of
8 bits get a scale a token at run time. Rotations that are folded into weights are in them; what
happens at run time (a rotation in front of out_proj, scales of the scan's operands) has no place
here, so those weights are turned back and kept in 16 bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ssmc.errors import UsageError
from ssmc.export import Exported
from ssmc.export.checkpoint import Checkpoint, Stored, linears, read_checkpoint
from ssmc.export.huggingface import CONFIG, GENERATION, TOKENIZER_CONFIG, write_settings
from ssmc.runtime import Artefact
from ssmc.runtime.artefact import TENSORS, TOKENIZER, Kind, whole_folder, write_json

REPORT = "ssmc-export.json"
"""What was kept in 16 bits and why; by it `--force` knows an export from a model's own folder."""
FOLDER = Kind("export", REPORT, (REPORT, CONFIG, GENERATION, TENSORS, TOKENIZER, TOKENIZER_CONFIG))
PACKED, PLAIN = 4, 8
Scheme = tuple[int, int | None, int]  # bits of the weight, columns of a group, bits of the input


def export(artefact: Artefact, out: Path, *, force: bool = False) -> Exported:
    """Write the checkpoint to the folder `out`, whole or not at all; says what it kept.

    Raises UsageError for a model that is not transformers', for one none of whose layers the
    format can express, and where `out` is taken.
    """
    found = read_checkpoint(artefact)
    for name, reason in _unreadable(found):
        found.kept[name] = reason
        del found.stored[name]
    if not found.stored:
        reasons = "; ".join(sorted(set(found.kept.values()))) or "it has no integers"
        raise UsageError(
            f"no linear layer of this artefact can be expressed: {reasons}",
            hint="compile with --recipe dynamic",
        )
    with whole_folder(out, FOLDER, force=force) as folder:
        save_file(_tensors(found), folder / TENSORS, {"format": "pt"})
        write_settings(artefact, found.config | {"dtype": "bfloat16"}, _method(found), folder)
        if artefact.tokenizer is not None:
            (folder / TOKENIZER).write_text(artefact.tokenizer, encoding="utf-8")
        write_json(folder / REPORT, {"kept": found.kept, "recipe": artefact.about.get("recipe")})
    return Exported(out, found.kept)


def _unreadable(found: Checkpoint) -> list[tuple[str, str]]:
    """The layers that no reader takes in integers of their width, and why."""
    named = initialised_by_name(found.skeleton)
    reasons = []
    for name, stored in found.stored.items():
        if stored.bits not in (PACKED, PLAIN):
            reasons.append((name, f"weights of {stored.bits} bits"))
        elif stored.bits == PACKED and name.removesuffix(".weight") in named:
            reasons.append((name, "transformers does not load its weight packed"))
    return reasons


def initialised_by_name(skeleton: Any) -> set[str]:
    """The linear layers whose `weight` the initialisation of their owner asks for.

    transformers runs it when it loads a model, also where each tensor is there, and a packed layer
    has no tensor called so.
    """
    found = set()
    for name, linear in linears(skeleton).items():
        weight = linear._parameters.pop("weight")
        try:
            skeleton._init_weights(skeleton.get_submodule(name.rpartition(".")[0]))
        except AttributeError:
            found.add(name)
        finally:
            linear._parameters["weight"] = weight
    return found


def _tensors(found: Checkpoint) -> dict[str, Tensor]:
    """What the file holds: integers and scales, and in bfloat16 all else but what is tied."""
    tensors: dict[str, Tensor] = {}
    for name, value in found.tensors.items():
        if name in found.stored:
            tensors |= _layer(name.removesuffix(".weight"), found.stored[name])
        elif name not in found.tied:
            tensors[name] = value.to(torch.bfloat16).contiguous()
    return tensors


def _layer(layer: str, stored: Stored) -> dict[str, Tensor]:
    scale = {f"{layer}.weight_scale": stored.scale.bfloat16().contiguous()}
    if stored.bits == PLAIN:
        return {f"{layer}.weight": stored.q.contiguous()} | scale
    shape = torch.tensor(stored.q.shape, dtype=torch.int64)
    packed = pack(stored.q, stored.bits)
    return {f"{layer}.weight_packed": packed, f"{layer}.weight_shape": shape} | scale


def pack(q: Tensor, bits: int) -> Tensor:
    """int8 [N, K] as int32 [N, K * bits / 32], each 32 / bits columns, the first lowest.

    2^(bits - 1) is added; where K does not fill an integer, zeros do.
    """
    each = 32 // bits
    raised = torch.nn.functional.pad(q.to(torch.int64) + (1 << (bits - 1)), (0, -q.shape[1] % each))
    shifts = torch.arange(0, 32, bits)
    words = (raised.unflatten(1, (-1, each)) << shifts).sum(2)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _method(found: Checkpoint) -> dict[str, Any]:
    """The `quantization_config`: a group of layers a scheme."""
    schemes: dict[Scheme, list[str]] = {}
    for name, stored in found.stored.items():
        key = (stored.bits, stored.group, stored.inputs)
        schemes.setdefault(key, []).append(name.removesuffix(".weight"))
    groups = {
        f"group_{i}": _group(scheme, layers if len(schemes) > 1 else ["Linear"])
        for i, (scheme, layers) in enumerate(sorted(schemes.items(), key=str))
    }
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(n for n in linears(found.skeleton) if f"{n}.weight" not in found.stored),
    }


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    bits, group, inputs = scheme
    integers = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False}
    shared = (
        {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    )
    token = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    return {
        "targets": targets,
        "format": "int-quantized" if bits == PLAIN else "pack-quantized",
        "weights": integers | shared,
        "input_activations": token if inputs == 8 else None,
        "output_activations": None,
    }
