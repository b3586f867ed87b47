"""The files that `train_demo` writes: the model's folder, its training record, its model card."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import MambaForCausalLM, PreTrainedTokenizerFast

from ssmc.errors import UsageError

MODEL_CARD = """\
# {name}

A Mamba-1 language model of {params:,} parameters (width {d_model}, {layers} layers, state {state}),
trained from scratch by `tools/train_demo.py` of ssmc. It is small: good for testing a compiler,
not for answering questions.

## Trained on

| file | documents | characters | SHA-256 |
| --- | --- | --- | --- |
{sources}

{train_tokens:,} tokens of a byte-level BPE with {vocabulary:,} entries, trained on the same text:
`<|endoftext|>` (0) stands before each document, `<|pad|>` (1) is unused.

## How

{steps:,} steps of {batch} sequences of {seq:,} tokens ({tokens:,} tokens seen), AdamW, peak
learning rate {lr:g} with warm-up and a cosine down, seed {seed}; torch {torch}, transformers
{transformers}, device {device}. The loss ended at {final_loss:.3f} nats a token;
`training.json` has its curve. The weights are saved in bfloat16.

{validation}

## Use

`AutoModelForCausalLM.from_pretrained(FOLDER)` and `AutoTokenizer.from_pretrained(FOLDER)`.
"""


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to write into: becomes `path` at the end, vanishes on any error.

    Raises:
        UsageError: `path` is a file, or a folder with something in it.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise UsageError(f"{path} is there already", hint="choose another folder or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as temporary:
        folder = Path(temporary, "model")
        folder.mkdir()
        yield folder
        folder.replace(path)


def save(
    folder: Path,
    name: str,
    model: MambaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    record: dict[str, Any],
) -> None:
    """Write the model called `name` into `folder`: a Hugging Face folder, its record, its card."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Path(folder, "training.json").write_text(json.dumps(record, indent=1) + "\n")
    Path(folder, "README.md").write_text(model_card(name, record))


def model_card(name: str, record: dict[str, Any]) -> str:
    """The model card of a training record, in Markdown."""
    rows = (
        f"| {source['file']} | {source['documents']:,} | {source['characters']:,} "
        f"| `{source['sha256'][:16]}...` |"
        for source in record["sources"]
    )
    validation = (
        f"Perplexity of held-out text in windows of {record['seq']:,} tokens: "
        f"{record['val_ppl']:.2f}."
        if "val_ppl" in record
        else "No held-out text was given, so nothing is known of how well it generalises."
    )
    details = {**record, "sources": "\n".join(rows), "validation": validation}
    return MODEL_CARD.format(name=name, final_loss=record["log"][-1][1], **details)
