"""Scans from fresh states, of which every step rounds the state as it would be stored."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx

from ssmc.core import is_call
from ssmc.core.dialect import operands
from ssmc.ops.scan import step_size
from ssmc.quant.recurrence import Store, rounded_recurrence


def simulated_scan(scan: fx.Node, args: tuple[Any, ...], store: Store) -> tuple[Tensor, None]:
    """What `scan`, called with `args`, gives where `store` rounds its state; no state is returned.

    Gradients reach all operands but A and D.
    """
    given = dict(zip(operands(scan), args, strict=True))
    selective = is_call(scan, "ssmc::selective_scan")
    return (_selective_scan if selective else _ssd_scan)(given, store), None


def _selective_scan(a: dict[str, Any], store: Store) -> Tensor:
    """`ssmc::selective_scan` as a scan of one head; its state is [B, 1, D, N] here."""
    u, dt = a["u"], step_size(a["dt"], a["dt_bias"], a["softplus"])
    steps, inputs, B, C = (v.unsqueeze(2) for v in (dt, dt * u, a["B"], a["C"]))
    y = rounded_recurrence(steps, inputs, a["A"].unsqueeze(0), B, C, store).squeeze(2)
    y = y if a["D"] is None else y + a["D"] * u
    return y if a["z"] is None else y * F.silu(a["z"])


def _ssd_scan(a: dict[str, Any], store: Store) -> Tensor:
    x, dt = a["x"], step_size(a["dt"], a["dt_bias"], softplus=True)
    dt = dt.clamp(a["dt_min"], a["dt_max"]).unsqueeze(-1)
    shares = x.shape[2] // a["B"].shape[2]
    B, C = (w.repeat_interleave(shares, dim=2) for w in (a["B"], a["C"]))
    y = rounded_recurrence(dt, dt * x, a["A"][:, None, None], B, C, store)
    return y if a["D"] is None else y + a["D"].unsqueeze(-1) * x
