"""Artefacts on disk: a folder of JSON and safetensors, written whole or not at all.

    ssmc.json          schema, tool versions, source, recipe, calibration, metrics, file hashes
    graph.json         the quantised graph
    model.safetensors  its tensors
    report.json        one record a pass
    tokenizer.json     where the model has one

The same inputs give the same bytes; reading executes nothing.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ssmc.core import Graph
from ssmc.errors import ArtefactError, UsageError
from ssmc.runtime.graph_json import dtype_from, graph_from_json, graph_to_json

SCHEMA = 1
MAIN, GRAPH, TENSORS, REPORT, TOKENIZER = (
    "ssmc.json", "graph.json", "model.safetensors", "report.json", "tokenizer.json",
)  # fmt: skip


@dataclass
class Artefact:
    """What is in an artefact: the graph, the description (`ssmc.json`), the report, the tokenizer."""

    graph: Graph
    about: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None


def is_artefact(path: str | Path) -> bool:
    """Whether `path` is a folder that holds an artefact."""
    return (Path(path) / MAIN).is_file()


# -- writing ----------------------------------------------------------------------------------


def write_artefact(artefact: Artefact, out: str | Path, *, force: bool = False) -> Path:
    """Write to the folder `out`, all of it or nothing.

    Raises UsageError where `out` exists and is not empty (with `force`: and is no artefact), or
    cannot be written.
    """
    out = Path(out)
    check_output(out, force=force)
    with _disk_errors(out), _temporary_folder(out) as folder:
        _write_files(artefact, folder)
        _move_into_place(folder, out)
    return out


def check_output(out: Path, *, force: bool) -> None:
    """Raise UsageError unless an artefact may be written to `out`."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise UsageError(f"{out} is a file", hint="name another output folder")
    if not is_artefact(out):
        raise UsageError(f"{out} is not empty and no artefact", hint="name another output folder")
    if not force:
        raise UsageError(f"{out} already holds an artefact", hint="--force replaces it")


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else error.strerror or str(error)
        raise UsageError(
            f"cannot write {out}: {reason}", hint="nothing was written; choose another folder"
        ) from error
    except SafetensorError as error:
        raise UsageError(f"cannot write {out}: {error}", hint="nothing was written") from error


@contextlib.contextmanager
def _temporary_folder(out: Path) -> Iterator[Path]:
    folder = out.parent / f".{out.name}.{os.getpid()}.part"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_files(artefact: Artefact, folder: Path) -> None:
    _write_json(folder / GRAPH, graph_to_json(artefact.graph))
    _write_json(folder / REPORT, artefact.report)
    tensors = {n: narrowest(t).contiguous() for n, t in sorted(artefact.graph.params().items())}
    save_file(tensors, folder / TENSORS)
    if artefact.tokenizer is not None:
        (folder / TOKENIZER).write_text(artefact.tokenizer, encoding="utf-8")
    about = artefact.about | {"schema": SCHEMA, "files": {p.name: _entry(p) for p in sorted(folder.iterdir())}}
    about["digest"] = _digest(about)
    _write_json(folder / MAIN, about)
    for path in [*folder.iterdir(), folder]:
        _sync(path)


def narrowest(value: torch.Tensor) -> torch.Tensor:
    """`value` in bfloat16 where that loses nothing (as scales do by construction)."""
    if value.dtype == torch.float32 and torch.equal(value.bfloat16().float(), value):
        return value.bfloat16()
    return value


def _write_json(path: Path, data: Any) -> None:
    text = json.dumps(data, indent=1, sort_keys=True, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _entry(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    return {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}


def _digest(about: dict[str, Any]) -> str:
    rest = {key: value for key, value in about.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _move_into_place(folder: Path, out: Path) -> None:
    old = folder.with_suffix(".old")
    if out.exists():
        out.rename(old)
    try:
        folder.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    _sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


# -- reading ----------------------------------------------------------------------------------


def read_artefact(path: str | Path) -> Artefact:
    """The artefact in the folder `path`, every file checked against its hash.

    Raises ArtefactError naming the file that is missing, truncated or altered, or saying that the
    schema is newer than this version reads.
    """
    path = Path(path)
    about = read_about(path)
    for name, entry in about["files"].items():
        _check_file(path / name, entry)
    data = json.loads((path / GRAPH).read_text(encoding="utf-8"))
    graph = graph_from_json(data, _tensors(path / TENSORS, data["tensors"]))
    tokenizer = path / TOKENIZER
    return Artefact(
        graph,
        about,
        json.loads((path / REPORT).read_text(encoding="utf-8")),
        tokenizer.read_text(encoding="utf-8") if TOKENIZER in about["files"] else None,
    )


def read_about(path: Path) -> dict[str, Any]:
    """The description of an artefact, checked; its other files are not looked at."""
    main = path / MAIN
    try:
        about = json.loads(main.read_text(encoding="utf-8"))
        schema = about["schema"]
    except OSError as error:
        raise ArtefactError(f"cannot read {main}: {error.strerror}", hint="is it an artefact?") from None
    except (ValueError, KeyError, TypeError):
        raise _damaged(main) from None
    if not isinstance(schema, int) or schema > SCHEMA:
        raise ArtefactError(
            f"{main} has schema {schema}; this version reads up to {SCHEMA}", hint="upgrade ssmc"
        )
    if about.get("digest") != _digest(about):
        raise _damaged(main)
    return dict(about)


def _damaged(path: Path, what: str = "is damaged") -> ArtefactError:
    return ArtefactError(f"{path} {what}", hint="compile the artefact again, or copy it again")


def _check_file(path: Path, entry: dict[str, Any]) -> None:
    if not path.is_file():
        raise _damaged(path, "is missing")
    if path.stat().st_size != entry["bytes"]:
        raise _damaged(path, f"has {path.stat().st_size} bytes, not {entry['bytes']}: truncated or altered")
    if _entry(path)["sha256"] != entry["sha256"]:
        raise _damaged(path, "was altered: its hash differs")


def _tensors(path: Path, specs: dict[str, Any]) -> dict[str, torch.Tensor]:
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise _damaged(path, f"is no safetensors file ({error})") from None
    if stored.keys() != specs.keys():
        odd = sorted(stored.keys() ^ specs.keys())[0]
        raise _damaged(path, f"and {GRAPH} disagree about tensor '{odd}'")
    tensors = {name: stored[name].to(dtype_from(spec["dtype"])) for name, spec in specs.items()}
    for name, spec in specs.items():
        if list(tensors[name].shape) != spec["shape"]:
            raise _damaged(path, f"holds '{name}' as {list(tensors[name].shape)}, not {spec['shape']}")
    return tensors
