"""The files of a checkpoint: found, checked before anything reads them, and identified."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ssmc.core.disk import read_json
from ssmc.core.store import Store
from ssmc.errors import NumericsError, UsageError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_ZIP, _PICKLE, _LFS = b"PK\x03\x04", b"\x80", b"version https://git-lfs"


def first_line(error: Exception) -> str:
    """What a foreign error says, on one line; its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def safetensors_files(folder: Path) -> list[Path]:
    """A folder's safetensors files, checked; UsageError where there are none or one is broken."""
    if (folder / SINGLE).is_file():
        files = [folder / SINGLE]
    elif (folder / INDEX).is_file():
        files = _shards(folder / INDEX)
    else:
        raise _no_weights(folder)
    for file in files:
        _check(file)
    return files


def _shards(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UsageError(f"{index} has no weight_map", hint="download the checkpoint again")
    files = [index.parent / str(name) for name in sorted(set(names.values()))]
    for file in files:
        if not file.is_file():
            raise UsageError(
                f"{file} is missing, though {index.name} lists it",
                hint="download the checkpoint again",
            )
    return files


def _no_weights(folder: Path) -> UsageError:
    pickled = sorted(file.name for pattern in _PICKLED for file in folder.glob(pattern))
    if pickled:
        return UsageError(
            f"{folder} has only {pickled[0]}, a pickled file, where {SINGLE} is expected",
            hint="unpickling can run any code: save the model as safetensors where you trust it",
        )
    return UsageError(
        f"{folder} has neither {SINGLE} nor {INDEX}", hint="give the folder with the weights"
    )


def _check(file: Path) -> None:
    """Raise UsageError, naming the file, unless it is whole and safetensors."""
    with file.open("rb") as stream:
        length = int.from_bytes(start := stream.read(8), "little")
        head = start + stream.read(1024)
    if head.startswith(_LFS):
        raise UsageError(f"{file} is a Git LFS pointer", hint="fetch the weights: git lfs pull")
    if head[8:9] != b"{":
        pickled = head.startswith((_ZIP, _PICKLE))
        found = "a pickled file where safetensors are expected" if pickled else "not safetensors"
        raise UsageError(
            f"{file} is {found}", hint="download the checkpoint again, in safetensors format"
        )
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        size, whole = file.stat().st_size, _whole_size(file, length)
        cut = whole is None or size < whole
        found = f"truncated: {size} of {whole or 'more'} bytes" if cut else f"damaged: {error}"
        raise UsageError(f"{file} is {found}", hint="download the file again") from None


def _whole_size(file: Path, header: int) -> int | None:
    """The size that a safetensors header announces, None where the header is cut as well."""
    with file.open("rb") as stream:
        stream.seek(8)
        try:
            entries = json.loads(stream.read(header))
            ends = [e["data_offsets"][1] for name, e in entries.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError):
            return None
    return 8 + header + max(ends, default=0)


def stored_dtype(files: Iterable[Path]) -> torch.dtype:
    """The one dtype of all floating-point tensors of safetensors files, float32 where they mix."""
    found = set()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            found |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    floating = {_FLOATS[name] for name in found if name in _FLOATS}
    return floating.pop() if len(floating) == 1 else torch.float32


def kept_in(store: Store, module: nn.Module) -> nn.Module:
    """The module with its weights in `store`, in float32; tied ones once."""
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    store.lend([t.data for t in tensors.values()])
    for tensor in tensors.values():
        value = tensor.data.float() if tensor.is_floating_point() else tensor.data
        tensor.data = store.keep(value)
    store.lend(())
    return module


def fingerprint(files: Iterable[Path]) -> str:
    """SHA-256 over the files' bytes, in the order given."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def check_weights_finite(module: nn.Module) -> None:
    """Raise NumericsError naming the first parameter or buffer with NaN or infinity."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if not torch.isfinite(tensor).all():
            raise NumericsError(
                f"tensor '{name}' of the checkpoint holds NaN or infinity",
                hint="the checkpoint is damaged, or its training diverged",
            )


def float_bytes(module: nn.Module) -> int:
    """The size in bytes of the module's parameters at 16 bits each, tied ones once."""
    return 2 * sum(parameter.numel() for parameter in module.parameters())
