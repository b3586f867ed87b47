"""Fixtures for every test: few threads, fixed seeds, and models and text that may be missing."""

from __future__ import annotations

import os

# Before torch starts its threads: on a busy machine spinning ones steal each other's time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# The tests of `make test` are those of a machine without a GPU, wherever they run.
if os.environ.get("SSMC_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

# Kernels run in Triton's interpreter where there is no GPU; it has to be said before they load.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

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


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact of the embedded model, compiled on little text."""
    import ssmc

    compiled = ssmc.compile("demo", samples=8, length=128)
    return compiled.save(tmp_path_factory.mktemp("artefacts") / "demo")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a random model of three layers, with tokenizer and text.txt."""
    from tiny import write_model

    return write_model(tmp_path_factory.mktemp("models") / "tiny-mamba")


@pytest.fixture(scope="session")
def tiny_artefact(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact of the model in tiny_folder. Not to be changed."""
    import ssmc

    text = tiny_folder / "text.txt"
    compiled = ssmc.compile(str(tiny_folder), calibration=text, samples=4, length=32)
    return compiled.save(tmp_path_factory.mktemp("artefacts") / "tiny")


@pytest.fixture
def spoilt(tiny_artefact: Path, tmp_path: Path) -> Path:
    """A copy of tiny_artefact, to be spoilt."""
    return Path(shutil.copytree(tiny_artefact, tmp_path / "artefact"))
