"""The format `hf`: the artefact, with the files by which transformers finds and loads a model.

`AutoModelForCausalLM.from_pretrained` gives a CompiledForCausalLM for it
(`ssmc/integrations/model.py`). The folder is an artefact still, and ssmc runs it as any other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ssmc
from ssmc.errors import UsageError
from ssmc.export import Exported
from ssmc.runtime import Artefact
from ssmc.runtime.artefact import FILES, MAIN, Kind, whole_folder, write_files, write_json

CONFIG, GENERATION, TOKENIZER_CONFIG = (
    "config.json", "generation_config.json", "tokenizer_config.json",
)  # fmt: skip
FOLDER = Kind("artefact", MAIN, (*FILES, CONFIG, GENERATION, TOKENIZER_CONFIG))


def export(artefact: Artefact, out: Path, *, force: bool = False) -> Exported:
    """Write the artefact, with transformers' files, to the folder `out`, whole or not at all.

    Raises UsageError for a model that is not transformers', and where `out` is taken.
    """
    config = own_config(artefact)
    with whole_folder(out, FOLDER, force=force) as folder:
        write_files(artefact, folder)
        write_settings(artefact, config | {"dtype": "float32"}, _method(), folder)
    return Exported(out)


def write_settings(
    artefact: Artefact, config: dict[str, Any], method: dict[str, Any], folder: Path
) -> None:
    """Write transformers' JSON files: of the model, quantised by `method`, and its tokenizer."""
    write_json(folder / CONFIG, config | {"quantization_config": method})
    write_json(folder / GENERATION, _generation(artefact, config))
    if artefact.tokenizer is not None:
        write_json(folder / TOKENIZER_CONFIG, _tokenizer(artefact, artefact.tokenizer))


def own_config(artefact: Artefact) -> dict[str, Any]:
    """The config.json of an artefact's model; UsageError where it is none of transformers."""
    config: dict[str, Any] | None = artefact.about.get("config")
    if config is None:
        name = artefact.about["source"]["name"]
        raise UsageError(
            f"'{name}' is no causal language model of transformers, whose format this is",
            hint="ssmc.load runs the artefact as it is; one of an earlier ssmc, compile again",
        )
    return config


def _method() -> dict[str, Any]:
    return {"quant_method": "ssmc", "version": ssmc.__version__}


def _generation(artefact: Artefact, config: dict[str, Any]) -> dict[str, Any]:
    tokens = {name: config.get(name) for name in ("bos_token_id", "pad_token_id")}
    tokens["eos_token_id"] = artefact.about.get("eos")
    return {name: token for name, token in tokens.items() if token is not None}


def _tokenizer(artefact: Artefact, tokenizer: str) -> dict[str, Any]:
    """Prompts are padded on the left: only then does what is generated follow them."""
    chat = artefact.about.get("chat") or {}
    tokens = {"eos_token": _text(tokenizer, artefact.about.get("eos"))} | chat.get("tokens", {})
    tokens.setdefault("pad_token", tokens["eos_token"])
    settings = {name: token for name, token in tokens.items() if token is not None}
    if "template" in chat:
        settings["chat_template"] = chat["template"]
    return settings | {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}


def _text(tokenizer: str, token: int | None) -> str | None:
    """A token as its tokenizer writes it."""
    from tokenizers import Tokenizer

    return None if token is None else Tokenizer.from_str(tokenizer).id_to_token(token)
