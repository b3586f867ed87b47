"""A checkpoint folder to spoil."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from .models import build

EditTensors = Callable[[Path, Callable[[dict[str, Tensor]], object]], None]


@pytest.fixture(scope="session")
def _saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build("mamba").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(_saved: Path, tmp_path: Path) -> Path:
    """A Hugging Face folder of the tiny Mamba-1, to be spoilt."""
    return Path(shutil.copytree(_saved, tmp_path / "tiny"))


@pytest.fixture
def edit_tensors() -> EditTensors:
    """Rewrites a safetensors file with its dictionary of tensors changed in place."""
    from safetensors.torch import load_file, save_file

    def edit(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return edit
