"""GPTQ: round a weight column by column, and make up for each error in the columns to come.

Frantar, Ashkboos, Hoefler and Alistarh 2023, arXiv 2210.17323.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmc.errors import NumericsError
from ssmc.quant.weights import WeightFormat

BLOCK = 128
"""Columns between two updates of all that follow (section 4, step 2), where no group says."""


class Hessian:
    """X X' over the inputs of a linear layer, [K, K] float64: the Hessian of its squared error.

    That has a factor of two (section 3), which changes nothing. `later` leaves what batches add in
    `terms`, on the host, for who is to add them up in an order of his own.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu", later: bool = False) -> None:
        self.matrix = torch.zeros((width, width), dtype=torch.float64, device=device)
        self.later = later
        self.terms: list[Tensor] = []
        self._factors: dict[tuple[float, bool], tuple[Tensor, Tensor]] = {}

    def add(self, x: Tensor) -> None:
        """Take in inputs [..., K]; sums of a batch are float32."""
        x = x.reshape(-1, x.shape[-1]).float()
        if self.later:
            self.terms.append((x.T @ x).to("cpu", non_blocking=True))
        else:
            self.matrix += x.T @ x
        self._factors.clear()

    def factor(self, damping: float, act_order: bool) -> tuple[Tensor, Tensor]:
        """The order in which columns are taken, and the factor of the inverse in that order."""
        key = (damping, act_order)
        if key not in self._factors:
            diagonal = self.matrix.diagonal()
            columns = torch.arange(len(diagonal), device=diagonal.device)
            if act_order:
                columns = diagonal.argsort(descending=True, stable=True)
            damped = self.damped(damping)[columns][:, columns]
            self._factors[key] = columns, _inverse_factor(damped, damping).float()
        return self._factors[key]

    def damped(self, damping: float) -> Tensor:
        """X X' with `damping` times the mean of its diagonal added to the diagonal."""
        damped = self.matrix.clone()
        damped.diagonal().add_(damping * self.matrix.diagonal().mean())
        return damped

    def error(self, difference: Tensor) -> float:
        """The squared error of the layer's outputs, for the change [N, K] of its weight."""
        difference = difference.double()
        return ((difference @ self.matrix) * difference).sum().item()


def gptq(
    weight: Tensor,
    hessian: Hessian,
    form: WeightFormat,
    damping: float = 0.01,
    act_order: bool = False,
) -> tuple[Tensor, Tensor]:
    """Integers int8 [N, K] and scales [N, G] of weight [N, K] (algorithm 1).

    `damping` times the mean of the Hessian's diagonal is added to it. Scales of groups are those of
    the columns as updated when the group begins (section 5, 'additional tricks'). `act_order` takes
    the columns by decreasing diagonal, as the authors' code can; scales are then those of the
    weight as it was. NumericsError where the damped Hessian is not positive definite.
    """
    columns, factor = hessian.factor(damping, act_order)
    scale = form.scales(weight)
    group = columns // (weight.shape[1] // scale.shape[1])
    renew = form.group is not None and not act_order
    w, q = weight[:, columns].clone(), torch.empty_like(weight, dtype=torch.int8)
    size = form.group or BLOCK
    for start in range(0, len(columns), size):
        part = slice(start, min(start + size, len(columns)))
        if renew:
            scale[:, start // size] = form.scales(w[:, part])[:, 0]
        q[:, columns[part]], errors = _round_block(
            w[:, part], scale[:, group[part]], factor[part, part], form
        )
        w[:, part.stop :] -= errors @ factor[part, part.stop :]
    return q, scale


def _round_block(
    w: Tensor, scale: Tensor, factor: Tensor, form: WeightFormat
) -> tuple[Tensor, Tensor]:
    """Integers and errors, both [N, n], of the columns of w, which is spent.

    scale [N, n] holds that of each column. An error is divided by the diagonal of factor [n, n].
    """
    q, errors = torch.empty_like(w, dtype=torch.int8), torch.empty_like(w)
    for j in range(w.shape[1]):
        column, s = w[:, j : j + 1], scale[:, j : j + 1]
        rounded = form.round(column, s)
        error = (column - form.values(rounded, s)) / factor[j, j]
        w[:, j:] -= error * factor[j, j:]
        q[:, j : j + 1], errors[:, j : j + 1] = rounded, error
    return q, errors


def _inverse_factor(damped: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse, [K, K] (section 4, step 3)."""
    upper, failed = torch.linalg.cholesky_ex(
        torch.cholesky_inverse(_cholesky(damped, damping)), upper=True
    )
    if failed:
        raise _not_definite(damped, damping)
    return upper


def _cholesky(damped: Tensor, damping: float) -> Tensor:
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        raise _not_definite(damped, damping)
    return lower


def _not_definite(damped: Tensor, damping: float) -> NumericsError:
    return NumericsError(
        f"the Hessian of {len(damped)} inputs is not positive definite, "
        f"damped by {damping} of its mean",
        hint="raise gptq{damping=...}, or calibrate on more text: --samples",
    )


def corrected(weight: Tensor, hessian: Hessian, outputs: Tensor, damping: float = 0.01) -> Tensor:
    """The weight [N, K] whose outputs are nearest to given ones, on the inputs of the Hessian.

    `outputs` [N, K] float64 is Y X', the given outputs times the inputs X: where X is what the
    layer reads in a quantised model and Y what it puts out in the model in float, the weight makes
    up for errors of the layers before it (Li et al. 2025, 'GPTAQ', arXiv 2504.02692, whose sum over
    columns this takes at once, as a regression). With damping it stays nearer to `weight`.
    """
    missing = outputs - weight.double() @ hessian.matrix
    lower = _cholesky(hessian.damped(damping), damping)
    return (weight.double() + torch.cholesky_solve(missing.T, lower).T).float()
