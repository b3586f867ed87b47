"""Tiny models with tokenizers, as folders and compiled, for what does not need a trained model."""

from __future__ import annotations

from pathlib import Path

from frontend.models import VOCABULARY, build, tokens
from tokenizers import Tokenizer, models, pre_tokenizers

import ssmc
from ssmc.runtime import CompiledModel

EOS = 0
TEXT = " ".join(f"w{(7 * i * i + i) % (VOCABULARY - 2) + 1}" for i in range(200))


def tokenizer() -> Tokenizer:
    """Words w1, w2, ... split at spaces; token 0 separates texts."""
    words = {"<eos>": EOS} | {f"w{i}": i for i in range(1, VOCABULARY - 1)}
    made = Tokenizer(models.WordLevel(words | {"<unk>": VOCABULARY - 1}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def write_model(folder: Path, architecture: str = "mamba") -> Path:
    """A Hugging Face folder of a random model, with its tokenizer and a text beside it."""
    model = build(architecture, eos_token_id=EOS)
    model.save_pretrained(folder)
    tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "text.txt").write_text(TEXT)
    return folder


def compile_tiny(architecture: str = "mamba", passes: str = "hadamard,percentile") -> CompiledModel:
    """A random model, compiled on random tokens."""
    return ssmc.compile(build(architecture), passes=passes, calibration=tokens(4, 33))
