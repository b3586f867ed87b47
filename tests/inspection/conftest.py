"""A story of the embedded model, and one of an artefact without its model."""

from __future__ import annotations

from pathlib import Path

import pytest

import ssmc
from ssmc.compiler import Hooks, read_source
from ssmc.inspection.story import Story, of_compilation, of_compiled
from ssmc.recipe import make_recipe


@pytest.fixture(scope="session")
def story() -> Story:
    recipe = make_recipe(passes="hadamard{residual=true},percentile", samples=2, length=64)
    return of_compilation(read_source("demo", recipe), recipe, "demo", Hooks())


@pytest.fixture(scope="session")
def bare_story(tiny_artefact: Path) -> Story:
    return of_compiled(ssmc.load(tiny_artefact, device="cpu"), "tiny")
