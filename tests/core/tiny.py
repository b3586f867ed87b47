"""Tiny models, graphs and passes to try things on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmc import ops
from ssmc.core import Context, Graph, Pass, Record, make_plan, register, run_passes
from ssmc.core.options import parse_passes
from ssmc.frontend import trace

VOCABULARY = 128
WIDTH = 40
KINDS = ["mamba", "mamba2"]


class Toy(nn.Module):
    """A gated layer: small, without states, with a weight that two calls read."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10, bias=False)
        self.down = nn.Linear(10, 6)
        self.gamma = nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        normed = ops.rms_norm(x, self.gamma)
        return self.down(F.silu(self.up(normed)) + self.up(x)) + x


def toy() -> tuple[Toy, Graph]:
    """A fresh module and its graph."""
    module = Toy()
    return module, trace(module, torch.zeros(2, 5, 6))


def toy_context() -> Context:
    """Random inputs of the toy."""
    batches = [(torch.randn(2, 7, 6),) for _ in range(2)]
    return Context(batches, batches[0])


def language_model(kind: str, width: int = WIDTH, **options: Any) -> nn.Module:
    """A Hugging Face model of two layers whose tensors are all non-trivial."""
    import transformers as hf

    common: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": width, "state_size": 8}
    common |= {"num_hidden_layers": 2}
    torch.manual_seed(0)
    if kind == "llama":
        attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
        del common["state_size"]
        model: nn.Module = hf.LlamaForCausalLM(hf.LlamaConfig(**(common | attention | options)))
    elif kind == "jamba":
        model = hf.JambaForCausalLM(hf.JambaConfig(**(_jamba(common) | options)))
    elif kind == "mamba":
        model = hf.MambaForCausalLM(hf.MambaConfig(**(common | options)))
    else:
        heads = {"num_heads": width // 4, "head_dim": 8, "n_groups": 1, "chunk_size": 16}
        model = hf.Mamba2ForCausalLM(hf.Mamba2Config(**(common | heads | options)))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def _jamba(common: dict[str, Any]) -> dict[str, Any]:
    """A mixer with an MLP, then attention with experts."""
    layers = {"attn_layer_period": 2, "attn_layer_offset": 1}
    layers |= {"expert_layer_period": 2, "expert_layer_offset": 1}
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    experts = {"num_experts": 4, "num_experts_per_tok": 2}
    shared = {key: common[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")}
    return shared | layers | sizes | experts | {"mamba_d_state": 8, "mamba_dt_rank": 4}


@functools.cache
def _traced(kind: str, options: tuple[tuple[str, Any], ...]) -> Graph:
    return trace(language_model(kind, **dict(options)))


def graph(kind: str, **options: Any) -> Graph:
    """The graph of `language_model(kind, ...)`, of its own for every caller."""
    return _traced(kind, tuple(options.items())).copy()


@functools.cache
def calibration() -> tuple[tuple[Tensor], ...]:
    """Three batches of random ids below 120, the same for every caller."""
    generator = torch.Generator().manual_seed(1)
    return tuple((torch.randint(0, 120, (4, 31), generator=generator),) for _ in range(3))


def context() -> Context:
    """Random ids to calibrate on, and a probe."""
    batches = list(calibration())
    return Context(batches, (batches[0][0][:2],))


def apply(g: Graph, passes: str, given: Context | None = None) -> dict[str, Record]:
    """Run the passes and what they need over `g`; the records by name."""
    report = run_passes(g, make_plan(parse_passes(passes)), given or context())
    return {record.name: record for record in report.records}


def logits(g: Graph) -> Tensor:
    """The graph's result on the probe."""
    result: Tensor = g(*context().probe)[0]  # type: ignore[misc]
    return result


def error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||."""
    return ((actual - expected).norm() / expected.norm()).item()


def values(g: Graph, *names: str) -> dict[str, Tensor]:
    """The values of the nodes called `names` over the calibration batches, [batches, ...]."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def seen(node: torch.fx.Node, value: Any) -> None:
        if node.name in found:
            found[node.name].append(value)

    for batch in calibration():
        g.watch(seen, *batch)
    return {name: torch.stack(parts) for name, parts in found.items()}


def make_pass(
    name: str, run: Callable[[Any, Graph, Context], None] | None = None, **contract: Any
) -> type[Pass]:
    """Register a pass made of `run` and attributes of its class."""
    body = {"__doc__": f"{name}.", "name": name, "stage": "rewrite", "run": run or _nothing}
    cls = type(name.title(), (Pass,), body | contract)
    return register(dataclass(frozen=True)(cls))


def _nothing(self: Pass, g: Graph, context: Context) -> None:
    pass
