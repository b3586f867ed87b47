"""Loading a trained model: the embedded one, a folder, or a Hugging Face id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer
from torch import nn

from ssmc import demo
from ssmc.core.disk import read_json
from ssmc.core.store import Store
from ssmc.errors import UsageError, did_you_mean
from ssmc.frontend import hub, huggingface, state_spaces, weights
from ssmc.frontend.support import check_supported

Kind = Literal["huggingface", "state-spaces", "demo"]


@dataclass(frozen=True)
class Model:
    """A loaded language model.

    `module` is in float32 and evaluation mode; `tokenizer` is None where the folder has no
    tokenizer.json. `fingerprint` is the SHA-256 of the weight files, `float_bytes` the size of
    the parameters in bytes at 16 bits each.
    """

    module: nn.Module
    tokenizer: Tokenizer | None
    eos_token_id: int | None
    name: str
    kind: Kind
    folder: Path
    fingerprint: str
    float_bytes: int


def load_model(target: str, revision: str | None = None, store: Store | None = None) -> Model:
    """The model called `target`: `demo`, a local folder, or a Hugging Face id (with `revision`).

    With a `store` the weights are kept there, and never in memory all at once.

    Weights are read from safetensors, in one file or several; of state-spaces checkpoints from
    pytorch_model.bin, tensors only. Raises UsageError for a target, config or weight file that
    is missing or broken, UnsupportedError for an architecture without a Mamba mixer in each
    layer, NumericsError for NaN or infinity in the weights.
    """
    folder = _locate(target, revision)
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"{folder} has no config.json", hint="give the folder that holds config.json"
        )
    raw = read_json(folder / "config.json")
    tokenizer, generation = _tokenizer(folder), _generation_settings(folder)
    load = _state_spaces if state_spaces.describes(raw) else _huggingface
    module, files, kind = load(folder, raw, store)
    weights.check_weights_finite(module)
    return Model(
        module=module,
        tokenizer=tokenizer,
        eos_token_id=_first(generation.get("eos_token_id", huggingface.eos_token_id(module))),
        name=folder.resolve().name if Path(target).is_dir() else target,
        kind="demo" if target == "demo" else kind,
        folder=folder,
        fingerprint=weights.fingerprint(files),
        float_bytes=weights.float_bytes(module),
    )


def _locate(target: str, revision: str | None) -> Path:
    """The local folder of a target. A folder called like an id comes before the id."""
    path = demo.model_folder() if target == "demo" else Path(target)
    if path.is_file():
        raise UsageError(f"{target} is a file", hint="give the folder that it is in")
    if path.is_dir():
        if revision is not None:
            raise UsageError(f"{target} is a folder: only a Hugging Face id has revisions")
        return path
    if hub.is_id(target):
        return hub.download(target, revision)
    raise UsageError(
        f"there is no model '{target}': neither a folder nor a Hugging Face id (owner/name)",
        hint=did_you_mean(target, ["demo"]) or "give a folder with config.json, an id, or 'demo'",
    )


Loaded = tuple[nn.Module, list[Path], Kind]


def _huggingface(folder: Path, raw: dict[str, Any], store: Store | None) -> Loaded:
    skeleton = _skeleton(folder, raw)
    files = weights.safetensors_files(folder)
    if store is None:
        return huggingface.load(skeleton, folder), files, "huggingface"
    module = huggingface.load(skeleton, folder, dtype=weights.stored_dtype(files))
    return weights.kept_in(store, module), files, "huggingface"


def _state_spaces(folder: Path, raw: dict[str, Any], store: Store | None) -> Loaded:
    config = state_spaces.parse(raw, str(folder))
    skeleton = _skeleton(folder, state_spaces.translate(config))
    tensors = state_spaces.read_tensors(folder, config)
    module = huggingface.load(skeleton, folder, tensors)
    if store is not None:
        module = weights.kept_in(store, module)
    return module, [folder / state_spaces.WEIGHTS], "state-spaces"


def _skeleton(folder: Path, raw: dict[str, Any]) -> nn.Module:
    """The model's structure, supported: told before its weights are read."""
    skeleton = huggingface.skeleton(huggingface.config(raw, str(folder)))
    check_supported(skeleton)
    return skeleton


def _tokenizer(folder: Path) -> Tokenizer | None:
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more specific
        raise UsageError(f"{file}: {error}", hint="download the tokenizer again") from error
    tokenizer.no_truncation()  # texts are encoded whole, as transformers does unless it is asked to
    tokenizer.no_padding()
    return tokenizer


def _generation_settings(folder: Path) -> dict[str, Any]:
    file = folder / "generation_config.json"
    return read_json(file) if file.is_file() else {}


def _first(ids: Any) -> int | None:
    """The end-of-text token where a configuration may list several."""
    return ids[0] if isinstance(ids, list) else ids
