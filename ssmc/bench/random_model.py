"""A compiled model of a published size with random weights."""

from __future__ import annotations

import torch

from ssmc.bench.sizes import VOCABULARY, Size
from ssmc.core import Context, Graph
from ssmc.core.pipeline import apply_pass
from ssmc.frontend import trace
from ssmc.recipe import Recipe, make_recipe
from ssmc.runtime import CompiledModel
from ssmc.runtime.artefact import Artefact

SAMPLES, LENGTH = 4, 64  # of calibration: ranges of random activations settle at once


def random_recipe(scheme: str, passes: str | None, backend: str, seed: int) -> Recipe:
    """How a model with random weights is compiled; `passes` None are the usual ones.

    Raises UsageError for an unknown scheme, pass or backend.
    """
    chosen = {} if passes is None else {"passes": passes}
    recipe = make_recipe(
        scheme=scheme,
        samples=SAMPLES,
        length=LENGTH,
        seed=seed,
        backend=backend,
        where="options",
        **chosen,
    )
    recipe.plan()
    return recipe


def compile_random(size: Size, recipe: Recipe, device: torch.device) -> CompiledModel:
    """A model of `size` made and compiled on `device`, calibrated on random tokens.

    The passes run without the checks and statistics that a compilation keeps of each, which take
    longer than the passes.
    """
    graph = _graph(size, device)
    ids = torch.randint(0, VOCABULARY, (recipe.samples, recipe.length), device=device)
    context = Context([(ids,)], None, recipe.seed)
    for p in recipe.plan():
        apply_pass(graph, p, context)
    artefact = Artefact(graph, about=_about(size, recipe))
    return CompiledModel(artefact, recipe.backend, str(device))


def _graph(size: Size, device: torch.device) -> Graph:
    graph = trace(size.module(device))
    graph.module.to(device)
    return graph


def _about(size: Size, recipe: Recipe) -> dict[str, object]:
    source = {"kind": "random", "name": size.name}
    return {"source": source, "recipe": recipe.model_dump(), "eos": None}
