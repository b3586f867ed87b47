"""Train the model of `examples/word_breaks.py` on the demo's calibration text.

    PYTHONPATH=examples python tools/train_word_breaks.py

Takes a quarter of an hour on two cores and writes `examples/word_breaks.safetensors`.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
import typer
import word_breaks
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from training_scan import selective_scan

import ssmc.demo


def scan(self: word_breaks.Scan, u: Tensor) -> Tensor:
    """What `Scan.forward` computes, in parallel over chunks of the length."""
    dt, B, C = self.x_proj(u).split(self.sizes, dim=-1)
    operands = [u, F.softplus(self.dt_proj(dt)), B, C]
    u, dt, B, C = (x.flip(1) if self.reverse else x for x in operands)
    y = selective_scan(u, dt, -torch.exp(self.A_log), B, C, self.D)
    return y.flip(1) if self.reverse else y


def main(
    steps: Annotated[int, typer.Option(help="Updates.")] = 1500,
    batch: Annotated[int, typer.Option(help="Windows an update.")] = 16,
    lr: Annotated[float, typer.Option(help="The largest learning rate.")] = 4e-3,
) -> None:
    """Train, and write the weights."""
    torch.manual_seed(0)
    letters, breaks = word_breaks.windows(ssmc.demo.calibration_file(), 128)
    model = word_breaks.WordBreaks()
    word_breaks.Scan.forward = scan  # type: ignore[method-assign]
    optimizer = AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = OneCycleLR(optimizer, lr, total_steps=steps)
    for step in range(1, steps + 1):
        chosen = torch.randint(len(letters), (batch,))
        scores = model(letters[chosen])
        loss = F.cross_entropy(scores.flatten(0, 1), breaks[chosen].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            right = word_breaks.accuracy(scores, breaks[chosen])
            print(f"step {step}: loss {loss.item():.4f}, accuracy {right:.3f}", flush=True)
    save_file(model.state_dict(), word_breaks.WEIGHTS)


if __name__ == "__main__":
    typer.run(main)
