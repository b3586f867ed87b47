"""The embedded model and text, so that everything can be tried without a download."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent


def model_folder() -> Path:
    """The embedded Mamba-1 of 5.6 million parameters: a Hugging Face folder with tokenizer."""
    return _HERE


def calibration_file() -> Path:
    """256 passages of public-domain text, one JSON object with `text` a line."""
    return _HERE / "calibration.jsonl"


def evaluation_file() -> Path:
    """42 held-out documents of the same sources, in the same format."""
    return _HERE / "evaluation.jsonl"
