"""Artefacts are checked when they are read, and reading runs nothing."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ssmc.errors import ArtefactError, SsmcError, UnsupportedError
from ssmc.runtime import read_artefact
from ssmc.runtime.artefact import GRAPH, MAIN, REPORT, TENSORS, TOKENIZER, _digest, _entry

FILES = [MAIN, GRAPH, TENSORS, REPORT, TOKENIZER]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0.0, 0.37, 0.99])
def test_a_flipped_byte_is_found(spoilt: Path, name: str, where: float) -> None:
    raw = bytearray((spoilt / name).read_bytes())
    raw[int(where * len(raw))] ^= 0x10
    (spoilt / name).write_bytes(raw)
    with pytest.raises(ArtefactError, match=name) as caught:
        read_artefact(spoilt)
    assert caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_a_truncated_file_is_named(spoilt: Path, name: str, kept: float) -> None:
    raw = (spoilt / name).read_bytes()
    (spoilt / name).write_bytes(raw[: int(kept * len(raw))])
    with pytest.raises(ArtefactError, match=name):
        read_artefact(spoilt)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(spoilt: Path, name: str) -> None:
    (spoilt / name).unlink()
    with pytest.raises(ArtefactError, match=name):
        read_artefact(spoilt)


@pytest.mark.parametrize("schema", [2, 99, "1", None])
def test_a_newer_schema_is_refused(spoilt: Path, schema: Any) -> None:
    edit_main(spoilt, lambda about: about.update(schema=schema))
    with pytest.raises(ArtefactError, match=f"schema {schema}; this version reads up to 1"):
        read_artefact(spoilt)


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("kind", ["pickle", "zip"])
@pytest.mark.parametrize("hashes", ["old", "new"])
def test_a_pickle_for_safetensors_is_not_read(
    spoilt: Path, monkeypatch: pytest.MonkeyPatch, kind: str, hashes: str
) -> None:
    monkeypatch.chdir(spoilt.parent)
    if kind == "pickle":
        (spoilt / TENSORS).write_bytes(pickle.dumps(Payload()))
    else:
        with zipfile.ZipFile(spoilt / TENSORS, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Payload()))
    if hashes == "new":
        reseal(spoilt)
    with pytest.raises(ArtefactError, match=TENSORS):
        read_artefact(spoilt)
    assert not Path("executed").exists()


def edit_main(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    about = json.loads((folder / MAIN).read_text())
    change(about)
    (folder / MAIN).write_text(json.dumps(about | {"digest": _digest(about)}))


def reseal(folder: Path) -> None:
    """Make every hash right, as someone who means harm would."""
    entries = {p.name: _entry(p) for p in folder.iterdir() if p.name != MAIN}
    edit_main(folder, lambda about: about.update(files=entries))


def edit_graph(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads((folder / GRAPH).read_text())
    change(data)
    (folder / GRAPH).write_text(json.dumps(data))
    reseal(folder)


OPERATORS = [
    "os.system",
    "builtins::exec",
    "eval",
    "aten::add.Tensor",
    "aten::mul",
    "prim::Print",
    "torch.load",
    "ssmc::__class__",
    "ssmc::linear.__class__",
    "ssmc::name.format",
    "ssmc::no_such_operator",
    "__import__",
    "",
]


@pytest.mark.parametrize("target", OPERATORS)
def test_an_operator_outside_the_dialect_is_refused(spoilt: Path, target: str) -> None:
    edit_graph(spoilt, lambda data: data["nodes"][3].update(target=target, args=["mkdir executed"]))
    with pytest.raises(UnsupportedError, match="is not in the dialect") as caught:
        read_artefact(spoilt)
    assert str(spoilt / GRAPH) in str(caught.value)


# As the last of the inputs, a default value that torch.fx would write into the code that it runs.
CODE = "x=__import__('pathlib').Path('executed').mkdir()"


@pytest.mark.parametrize("name", ["input_ids", "l0_conv", "l2_ssm", "lm_head"])
def test_names_that_are_code_are_refused_and_do_not_run(
    spoilt: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(spoilt.parent)
    text = (spoilt / GRAPH).read_text()
    assert f'": "{name}"' in text
    (spoilt / GRAPH).write_text(text.replace(f'": "{name}"', f'": {json.dumps(CODE)}'))
    reseal(spoilt)
    with pytest.raises(ArtefactError, match="is no name for a node"):
        read_artefact(spoilt)
    assert not Path("executed").exists()


@pytest.mark.parametrize("key", ["x=1)#", "exact=print(), x"])
def test_a_keyword_that_is_code_is_refused(spoilt: Path, key: str) -> None:
    edit_graph(spoilt, lambda data: data["nodes"][-1].update(kwargs={key: 1}))
    with pytest.raises(ArtefactError, match="is no name for a node"):
        read_artefact(spoilt)


def test_a_tensor_name_that_is_code_is_refused(
    spoilt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    monkeypatch.chdir(spoilt.parent)
    old = json.loads((spoilt / GRAPH).read_text())
    name = next(iter(old["tensors"]))
    code = 'x"),getattr(__import__("os"),"mkdir")("executed"),getattr(self,"x'
    tensors = load_file(spoilt / TENSORS)
    save_file({code if n == name else n: t for n, t in tensors.items()}, spoilt / TENSORS)
    text = json.dumps(old).replace(json.dumps(name), json.dumps(code))
    (spoilt / GRAPH).write_text(text)
    reseal(spoilt)
    with pytest.raises(ArtefactError, match="is no name for a tensor"):
        read_artefact(spoilt)
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("nodes"),
        lambda data: data.pop("tensors"),
        lambda data: data.update(inputs=[]),
        lambda data: data["nodes"][-1].update(args=[{"node": "no_such_node"}]),
        lambda data: data["nodes"][-1].update(args=[]),
        lambda data: data["nodes"][-1].update(target=None),
        lambda data: data["nodes"].reverse(),
        lambda data: data["states"][0].update(dtype="load"),
        lambda data: data["states"][0].update(shape="ab"),
        lambda data: data.update(result={"node": "nowhere"}),
    ],
)
def test_a_graph_that_makes_no_sense_is_an_error_of_the_file(
    spoilt: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    edit_graph(spoilt, change)
    with pytest.raises(ArtefactError, match=GRAPH):
        read_artefact(spoilt)


def test_a_file_that_no_hash_covers_is_refused(spoilt: Path) -> None:
    edit_main(spoilt, lambda about: about["files"].pop(GRAPH))
    with pytest.raises(ArtefactError, match=rf"{GRAPH} is not listed"):
        read_artefact(spoilt)
    edit_main(spoilt, lambda about: about.pop("files"))
    with pytest.raises(ArtefactError, match=MAIN):
        read_artefact(spoilt)


def test_tensors_of_another_shape_are_named(spoilt: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(spoilt / TENSORS)
    name = next(n for n, t in tensors.items() if t.dim() == 2)
    save_file(tensors | {name: tensors[name][:-1].clone()}, spoilt / TENSORS)
    reseal(spoilt)
    with pytest.raises(ArtefactError, match=f"holds '{name}'"):
        read_artefact(spoilt)
    save_file(tensors | {"stranger": torch.zeros(2)}, spoilt / TENSORS)
    reseal(spoilt)
    with pytest.raises(ArtefactError, match="disagree about tensor 'stranger'"):
        read_artefact(spoilt)


def test_errors_of_reading_are_errors_of_the_command_line() -> None:
    assert issubclass(ArtefactError, SsmcError)
    with pytest.raises(ArtefactError, match=r"cannot read .*ssmc.json: No such file") as caught:
        read_artefact("nowhere")
    assert caught.value.exit_code == 2
