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
from ssmc.core.disk import sync
from ssmc.errors import ArtefactError, SsmcError, UsageError
from ssmc.runtime.graph_json import dtype_from, graph_from_json, graph_to_json

SCHEMA = 1
MAIN, GRAPH, TENSORS, REPORT, TOKENIZER = (
    "ssmc.json", "graph.json", "model.safetensors", "report.json", "tokenizer.json",
)  # fmt: skip
FILES = (MAIN, GRAPH, TENSORS, REPORT, TOKENIZER)


@dataclass(frozen=True)
class Kind:
    """A kind of folder: what it is called, the file that says it is one, and all it may hold."""

    name: str
    mark: str
    files: tuple[str, ...]


ARTEFACT = Kind("artefact", MAIN, FILES)


@dataclass
class Artefact:
    """An artefact in memory: graph, description (`ssmc.json`), report, tokenizer (as JSON)."""

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
    with whole_folder(Path(out), force=force) as folder:
        write_files(artefact, folder)
    return Path(out)


@contextlib.contextmanager
def whole_folder(out: Path, kind: Kind = ARTEFACT, *, force: bool) -> Iterator[Path]:
    """An empty folder for the files of a kind, which becomes `out` when they are written.

    Whatever interrupts that leaves what was there. Raises UsageError as `write_artefact` does.
    """
    check_output(out, kind, force=force)
    target = out.resolve()  # where `out` is a link, what it points to is replaced
    with _disk_errors(out), _temporary_folder(target) as folder:
        yield folder
        for path in [*folder.iterdir(), folder]:
            sync(path)
        _move_into_place(folder, target)


@contextlib.contextmanager
def whole_file(out: Path, magic: bytes, *, force: bool) -> Iterator[Path]:
    """Where to write a file that begins with `magic`; it becomes `out` when it is written.

    Whatever interrupts that leaves what was there. Raises UsageError where `out` is a folder,
    exists (with `force`: and begins otherwise), or cannot be written.
    """
    if out.is_dir():
        raise UsageError(f"{out} is a folder", hint="name a file")
    with _disk_errors(out):
        if out.exists():
            _check_file_replaced(out, magic, force=force)
        target = out.resolve()
        with _temporary_folder(target) as folder:
            part = folder / target.name
            yield part
            sync(part)
            part.replace(target)
            sync(target.parent)


def _check_file_replaced(out: Path, magic: bytes, *, force: bool) -> None:
    with out.open("rb") as file:
        if file.read(len(magic)) != magic:
            raise UsageError(f"{out} exists and is another file", hint="name another one")
    if not force:
        raise UsageError(f"{out} exists already", hint="--force replaces it")


def check_output(out: Path, kind: Kind = ARTEFACT, *, force: bool) -> None:
    """Raise UsageError unless a folder of a kind may be written to `out`."""
    hint = "name another output folder"
    _check_place(out, hint)
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / kind.mark).is_file():
        raise UsageError(f"{out} is not empty and no {kind.name}", hint=hint)
    foreign = sorted({p.name for p in out.iterdir()} - set(kind.files))
    if foreign:
        raise UsageError(
            f"{out} holds '{foreign[0]}', which is no part of an {kind.name}", hint=hint
        )
    if not force:
        raise UsageError(f"{out} already holds an {kind.name}", hint="--force replaces it")


def _check_place(out: Path, hint: str) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file", hint=hint)
    if out.resolve() == Path.cwd():
        raise UsageError(f"{out} is the current folder, which would be replaced", hint=hint)
    parent = next(p for p in out.resolve().parents if p.exists())
    if not parent.is_dir():
        raise UsageError(f"cannot write {out}: {parent} is a file", hint=hint)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"cannot write {out}: {parent} is not writable", hint=hint)


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise _unwritten(out, full, error.strerror or str(error)) from error
    except SafetensorError as error:  # holds the system's error as text
        full = f"(os error {errno.ENOSPC})" in str(error) or f"(os error {errno.EDQUOT})" in str(
            error
        )
        raise _unwritten(out, full, str(error)) from error


def _unwritten(out: Path, full: bool, reason: str) -> UsageError:
    return UsageError(
        f"cannot write {out}: {'the disk is full' if full else reason}",
        hint="nothing was written, and what was there is as it was; choose another folder",
    )


@contextlib.contextmanager
def _temporary_folder(out: Path) -> Iterator[Path]:
    folder = out.parent / f".{out.name}.{os.getpid()}.part"
    new = [p for p in folder.parents if not p.exists()]
    try:
        folder.mkdir(parents=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in new:
            with contextlib.suppress(OSError):  # not empty: the artefact is in it
                parent.rmdir()


def write_files(artefact: Artefact, folder: Path) -> None:
    """Write the files of an artefact into an empty folder."""
    write_json(folder / GRAPH, graph_to_json(artefact.graph))
    write_json(folder / REPORT, artefact.report)
    tensors = {n: narrowest(t).contiguous() for n, t in sorted(artefact.graph.params().items())}
    save_file(tensors, folder / TENSORS)
    shutil.copymode(folder / GRAPH, folder / TENSORS)  # safetensors makes it private
    if artefact.tokenizer is not None:
        (folder / TOKENIZER).write_text(artefact.tokenizer, encoding="utf-8")
    about = artefact.about | {
        "schema": SCHEMA,
        "files": {p.name: _entry(p) for p in sorted(folder.iterdir())},
    }
    about["digest"] = _digest(about)
    write_json(folder / MAIN, about)


def narrowest(value: torch.Tensor) -> torch.Tensor:
    """`value` in bfloat16 where that loses nothing (as scales do by construction)."""
    if value.dtype == torch.float32 and torch.equal(value.bfloat16().float(), value):
        return value.bfloat16()
    return value


def write_json(path: Path, data: Any) -> None:
    """Write data as the artefact's files have it: keys sorted, indented by one."""
    text = json.dumps(data, indent=1, sort_keys=True, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:  # piece by piece: weights are large
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _digest(about: dict[str, Any]) -> str:
    rest = {key: value for key, value in about.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _move_into_place(folder: Path, out: Path) -> None:
    old = folder.with_suffix(".old")
    if out.exists():
        out.rename(old)
    try:
        folder.rename(out)
    except BaseException:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
    sync(out.parent)


# -- reading ----------------------------------------------------------------------------------


def read_artefact(path: str | Path) -> Artefact:
    """The artefact in the folder `path`, every file checked against its hash.

    Raises ArtefactError naming the file that is missing, truncated or altered, or saying that the
    schema is newer than this version reads.
    """
    path = Path(path)
    about = read_about(path)
    for name in (GRAPH, TENSORS, REPORT, *about["files"]):
        _check_file(path / name, about["files"].get(name))
    tokenizer = path / TOKENIZER
    return Artefact(
        _read_graph(path),
        about,
        json.loads((path / REPORT).read_text(encoding="utf-8")),
        tokenizer.read_text(encoding="utf-8") if TOKENIZER in about["files"] else None,
    )


def _read_graph(path: Path) -> Graph:
    file = path / GRAPH
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        specs = data["tensors"]
    except (ValueError, KeyError, TypeError):
        raise _damaged(file, "does not describe a graph") from None
    tensors = _tensors(path / TENSORS, specs)
    try:
        return graph_from_json(data, tensors)
    except SsmcError as error:
        error.args = (f"{file}: {error}",)
        raise


def read_about(path: Path) -> dict[str, Any]:
    """The description of an artefact, checked; its other files are not looked at."""
    main = path / MAIN
    try:
        about = json.loads(main.read_text(encoding="utf-8"))
        schema = about["schema"]
    except OSError as error:
        raise ArtefactError(
            f"cannot read {main}: {error.strerror}", hint="is it an artefact?"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise _damaged(main) from None
    if not isinstance(schema, int) or schema > SCHEMA:
        raise ArtefactError(
            f"{main} has schema {schema}; this version reads up to {SCHEMA}", hint="upgrade ssmc"
        )
    if about.get("digest") != _digest(about) or not isinstance(about.get("files"), dict):
        raise _damaged(main)
    return dict(about)


def _damaged(path: Path, what: str = "is damaged") -> ArtefactError:
    return ArtefactError(f"{path} {what}", hint="compile the artefact again, or copy it again")


def _check_file(path: Path, entry: dict[str, Any] | None) -> None:
    if entry is None:
        raise _damaged(path, f"is not listed in {MAIN}")
    if not path.is_file():
        raise _damaged(path, "is missing")
    if path.stat().st_size != entry["bytes"]:
        raise _damaged(
            path, f"has {path.stat().st_size} bytes, not {entry['bytes']}: truncated or altered"
        )
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
            raise _damaged(
                path, f"holds '{name}' as {list(tensors[name].shape)}, not {spec['shape']}"
            )
    return tensors
