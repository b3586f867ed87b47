"""Fixtures for every test: few threads, fixed seeds, and models and text that may be missing."""

from __future__ import annotations

import os

# Before torch starts its threads: on a busy machine spinning ones steal each other's time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"

FindPath = Callable[[str], Path]


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` on a machine without a CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def shared_model() -> FindPath:
    """`shared_model("mamba-5m")`: the folder of a trained model, or the test is skipped."""
    return lambda name: _find(SHARED / "models" / name)


@pytest.fixture(scope="session")
def shared_data() -> FindPath:
    """`shared_data("test.jsonl")`: a file of text, or the test is skipped."""
    return lambda name: _find(SHARED / "data" / name)


def _find(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"needs {path}, which is not on this machine")
    return path
