"""Greedy decoding through the graph gives the tokens that Hugging Face's generate gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ssmc import demo
from ssmc.core.graph import Graph
from ssmc.frontend import Model, load_model, trace

PROMPT, NEW = 24, 28


def prompts(model: Model, count: int) -> Tensor:
    """The starts of held-out documents, all of one length."""
    rows = []
    with demo.evaluation_file().open(encoding="utf-8") as lines:
        for line, _ in zip(lines, range(count), strict=False):
            rows.append(model.tokenizer.encode(json.loads(line)["text"]).ids[:PROMPT])
    return torch.tensor(rows)


def greedy(graph: Graph, ids: Tensor) -> Tensor:
    """One prefill, then steps of length 1."""
    logits, states = graph(ids)
    chosen = [logits[:, -1].argmax(-1, keepdim=True)]
    while len(chosen) < NEW:
        logits, states = graph(chosen[-1], states=states)
        chosen.append(logits[:, -1].argmax(-1, keepdim=True))
    return torch.cat(chosen, dim=1)


def check(model: Model, count: int) -> Tensor:
    ids = prompts(model, count)
    model.module.generation_config.eos_token_id = None  # every row goes on to the end
    expected = model.module.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False
    )[:, PROMPT:]
    assert expected.shape == (count, NEW)
    assert torch.equal(greedy(trace(model.module), ids), expected)
    return expected


def test_greedy_tokens_of_the_demo_model() -> None:
    generated = check(load_model("demo"), count=5)
    assert len(generated.unique()) > NEW  # text, not one token over and over


@pytest.mark.parametrize("name", ["mamba2-6m", "llama-6m", "jamba-11m"])
def test_greedy_tokens_of_trained_models(name: str, shared_model: Callable[[str], Path]) -> None:
    check(load_model(str(shared_model(name))), count=3)
