"""Rotate activations with outliers by a Hadamard matrix, exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

import ssmc.ops
from ssmc.core import Context, Graph, Pass, register
from ssmc.passes._residual import ResidualStream
from ssmc.passes._transformer import attentions, gated_mlps
from ssmc.passes.linears import Linear, describe
from ssmc.quant.rotation import check_block, largest_block


@register
@dataclass(frozen=True)
class Hadamard(Pass):
    """Rotate what ends a mixer or an MLP online and fold the inverse into its last projection.

    Replaces:  out_proj(y)
    With:      out_proj_H(hadamard(y)),  out_proj_H.weight = W H

    y is the output of a scan (Quamba, Chiang et al. 2024, arXiv 2410.13229, section 4.3), that of
    attention in front of o_proj, and the product of a gated MLP in front of down_proj (QuaRot,
    Ashkboos et al. 2024, arXiv 2404.00456, section 4): its outliers spread over all channels.
    `block`: size of the rotation (default: the largest of known order that divides the width).
    `residual=true` rotates the residual stream as well, offline: embedding, head, and what reads
    and writes the stream (QuaRot, section 4).
    """

    name = "hadamard"
    stage = "rewrite"
    after = ("fold-norm", "sort-and-cluster")
    needs = ("ssm-sites", "linears")
    exact_to = 1e-5
    block: int | None = None
    residual: bool = False

    def run(self, g: Graph, context: Context) -> None:
        """Rotate the input of every last projection, then the residual stream if asked."""
        ends = [(site.scan, site.out_proj) for site in g.facts["ssm-sites"]]
        ends += [(found.call, found.o_proj) for found in attentions(g)]
        ends += [(mlp.product, mlp.down_proj) for mlp in gated_mlps(g)]
        for call, projection in ends:
            if projection is None:
                g.skip(call, "its output reaches no linear layer")
        # The scans of two directions end in one projection.
        for projection in dict.fromkeys(projection for _, projection in ends):
            if projection is not None:
                self._rotate_input(g, describe(projection))
        if self.residual:
            self._rotate_residual(g)

    def _rotate_input(self, g: Graph, linear: Linear) -> None:
        if linear.weight.op != "get_attr" or linear.tied:
            reason = "tied" if linear.tied else "computed"
            g.skip(linear.node, f"its weight is {reason}: {linear.weight.target}")
            return
        block = rotation_block(g, linear.input.meta["val"].shape[-1], self.block)
        with g.before(linear.node):
            y = g.call("ssmc::hadamard", linear.input, block, like=linear.node, suffix="hadamard")
        linear.node.replace_input_with(linear.input, y)
        rotate(g, linear.weight, block)
        g.match(linear.node)

    def _rotate_residual(self, g: Graph) -> None:
        stream = ResidualStream.find(g)
        block = rotation_block(g, g.param(stream.embedding).shape[-1], self.block)
        for reader in (stream.embedding, *stream.readers, *stream.biases):
            rotate(g, reader, block)
        for writer in stream.writers:
            g.set_param(writer, rotated(g.param(writer).mT, block).mT.contiguous())
        g.match(next(iter(stream.embedding.users)))


def rotated(value: torch.Tensor, block: int) -> torch.Tensor:
    """`value` with its last dimension rotated, [..., n]."""
    return ssmc.ops.hadamard(value.contiguous(), block)


def rotate(g: Graph, param: fx.Node, block: int) -> None:
    """Rotate the last dimension of a parameter."""
    g.set_param(param, rotated(g.param(param), block))


def rotation_block(g: Graph, width: int, asked: int | None) -> int:
    """The block a rotation of `width` channels uses: the one asked for, or the largest known.

    Raises UsageError where the block asked for does not divide the width or has no known order.
    """
    block = largest_block(width) if asked is None else asked
    check_block(width, block)
    if block != width:
        g.note(f"width {width}: rotated in {width // block} blocks of {block}")
    return block
