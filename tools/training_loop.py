"""The model side of `train_demo`: configuration, optimisation and validation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from training_scan import use_training_scan
from transformers import MambaConfig, MambaForCausalLM

from ssmc.errors import NumericsError

WARM_UP = 0.04  # of all steps
FINAL_RATE = 0.1  # of the peak learning rate
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
LARGEST_GRADIENT = 1.0

Report = Callable[[int, float], None]


@dataclass(frozen=True)
class Settings:
    """The shape of the model and how it is trained; lengths and steps in tokens and updates."""

    d_model: int
    layers: int
    state: int
    length: int
    batch: int
    steps: int
    lr: float
    seed: int


def new_model(settings: Settings, vocabulary: int) -> MambaForCausalLM:
    """An untrained Mamba-1, the same for the same seed; END (0) and PAD (1) as in the tokenizer."""
    torch.manual_seed(settings.seed)
    config = MambaConfig(
        vocab_size=vocabulary,
        hidden_size=settings.d_model,
        num_hidden_layers=settings.layers,
        state_size=settings.state,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        tie_word_embeddings=True,
    )
    model = MambaForCausalLM(config)
    use_training_scan(model)
    return model


def train(
    model: MambaForCausalLM, tokens: Tensor, settings: Settings, report: Report
) -> list[tuple[int, float]]:
    """Train `model` where it is, and return the loss curve as (step, nats a token).

    `report` is called with step and loss after every step. Sequences start anywhere in `tokens`.

    Raises:
        NumericsError: the loss became NaN or infinite.
    """
    optimizer = AdamW(_parameter_groups(model), lr=settings.lr, betas=BETAS)
    schedule = LambdaLR(optimizer, partial(_rate, steps=settings.steps))
    generator = torch.Generator().manual_seed(settings.seed)
    curve = []
    model.train()
    for step in range(1, settings.steps + 1):
        loss = _update(model, _sample(tokens, settings, generator), optimizer)
        schedule.step()
        if not math.isfinite(loss):
            raise NumericsError(f"the loss is {loss} at step {step}", hint="try a smaller --lr")
        if _is_recorded(step, settings.steps):
            curve.append((step, loss))
        report(step, loss)
    return curve


@torch.no_grad()
def validation_loss(model: MambaForCausalLM, tokens: Tensor, settings: Settings) -> float:
    """Mean loss over sequences that do not overlap, the first token of each not scored."""
    model.eval()
    count = len(tokens) // settings.length
    rows = tokens[: count * settings.length].view(count, settings.length)
    batches = rows.split(settings.batch)
    total = sum(_loss(model, batch).item() * len(batch) for batch in batches)
    return total / count


def _loss(model: MambaForCausalLM, ids: Tensor) -> Tensor:
    ids = ids.to(model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def _update(model: MambaForCausalLM, ids: Tensor, optimizer: AdamW) -> float:
    loss = _loss(model, ids)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
    optimizer.step()
    return loss.item()


def _sample(tokens: Tensor, settings: Settings, generator: torch.Generator) -> Tensor:
    last = len(tokens) - settings.length
    starts = torch.randint(last + 1, (settings.batch, 1), generator=generator)
    return tokens[starts + torch.arange(settings.length)]


def _rate(step: int, steps: int) -> float:
    """The factor of the learning rate: linear warm-up, then a cosine down to FINAL_RATE."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def _is_recorded(step: int, steps: int) -> bool:
    return step in (1, 10, 50, steps) or step % 100 == 0


def _parameter_groups(model: nn.Module) -> list[dict[str, object]]:
    """Matrices decay; vectors and the logarithm of A, whose zero means nothing, do not."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        decays = parameter.ndim >= 2 and not name.endswith("A_log")
        (matrices if decays else others).append(parameter)
    return [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": others, "weight_decay": 0.0},
    ]
