"""The sizes of published models, and models of these sizes with random weights.

How long a model takes does not depend on the values of its weights, so a size is measured without
its checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ssmc.errors import UsageError, choices
from ssmc.frontend import huggingface, state_spaces

VOCABULARY = 50280


@dataclass(frozen=True)
class Size:
    """A model by width and number of layers; the rest of its mixers is mamba_ssm's default.

    Mamba1: expansion 2, state 16, rank of dt width / 16, 4 taps. Mamba2: expansion 2, heads of 64,
    state 128, one group, 4 taps. Embedding and head are tied.
    """

    name: str
    layer: Literal["Mamba1", "Mamba2"]
    d_model: int
    n_layer: int

    def config(self) -> dict[str, Any]:
        """The config.json of mamba_ssm's `MambaLMHeadModel`."""
        return {
            "d_model": self.d_model,
            "n_layer": self.n_layer,
            "vocab_size": VOCABULARY,
            "ssm_cfg": {"layer": self.layer},
            "rms_norm": True,
            "residual_in_fp32": True,
            "tie_embeddings": True,
        }

    def module(self, device: torch.device | str) -> nn.Module:
        """The transformers model in float32 on `device`, its weights as before training.

        As mamba_ssm draws them: transformers' own draw is wide enough that a model amplifies
        rounding errors from layer to layer, which trained ones do not.
        """
        parsed = state_spaces.parse(self.config(), self.name)
        config = huggingface.config(state_spaces.translate(parsed), self.name)
        module = huggingface.untrained(config, device)
        for name, child in module.named_modules():
            if name.endswith(("in_proj", "x_proj")):
                nn.init.kaiming_uniform_(child.weight, a=math.sqrt(5))
            elif isinstance(child, nn.Embedding):
                nn.init.normal_(child.weight, std=0.02)
        return module


# The model cards of huggingface.co/state-spaces, mamba-130m to mamba-2.8b (arXiv 2312.00752) and
# mamba2-130m to mamba2-2.7b (arXiv 2405.21060).
SIZES = {
    size.name: size
    for size in (
        Size("130m", "Mamba1", 768, 24),
        Size("370m", "Mamba1", 1024, 48),
        Size("790m", "Mamba1", 1536, 48),
        Size("1.4b", "Mamba1", 2048, 48),
        Size("2.8b", "Mamba1", 2560, 64),
        Size("mamba2-130m", "Mamba2", 768, 24),
        Size("mamba2-370m", "Mamba2", 1024, 48),
        Size("mamba2-780m", "Mamba2", 1536, 48),
        Size("mamba2-1.3b", "Mamba2", 2048, 48),
        Size("mamba2-2.7b", "Mamba2", 2560, 64),
    )
}


def find_size(name: str) -> Size:
    """The size called `name`; UsageError naming the closest where there is none."""
    if name not in SIZES:
        raise UsageError(f"there is no published size '{name}'", hint=choices(name, SIZES))
    return SIZES[name]
