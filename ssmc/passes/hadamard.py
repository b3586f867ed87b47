"""Rotate activations with outliers by a Hadamard matrix, exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

import ssmc.ops
from ssmc.core import Context, Graph, Pass, register
from ssmc.core.dialect import operands
from ssmc.passes._residual import ResidualStream
from ssmc.passes._transformer import Attention, attentions, mlps
from ssmc.passes._values import ValuePath
from ssmc.passes.linears import Linear, describe
from ssmc.quant.rotation import check_block, largest_block


@register
@dataclass(frozen=True)
class Hadamard(Pass):
    """Rotate what ends a mixer or an MLP online and fold the inverse into its last projection.

    Replaces:  out_proj(y)
    With:      out_proj_H(hadamard(y)),  out_proj_H.weight = W H

    y is the output of a scan (Quamba, Chiang et al. 2024, arXiv 2410.13229, section 4.3), that of
    attention in front of o_proj, and what an MLP has in front of down_proj (QuaRot,
    Ashkboos et al. 2024, arXiv 2404.00456, section 4): its outliers spread over all channels.
    `block`: size of the rotation (default: the largest of known order that divides the width).
    `residual=true` rotates the residual stream as well, offline: embedding, head, and what reads
    and writes the stream (QuaRot, section 4). `values=true` rotates the values of attention, each
    head for itself and offline, instead of what o_proj reads: the rows of v_proj and, since
    attention mixes tokens and no channels, the columns of o_proj (QuaRot, section 4, without its
    online rotation across heads). Caches then hold rotated values. Heads are rotated in the largest
    blocks of known order that divide them.
    """

    name = "hadamard"
    stage = "rewrite"
    after = ("fold-norm", "sort-and-cluster")
    needs = ("ssm-sites", "linears")
    exact_to = 1e-5
    block: int | None = None
    residual: bool = False
    values: bool = False

    def run(self, g: Graph, context: Context) -> None:
        """Rotate values if asked, the input of every last projection, then the residual stream."""
        ends = [(site.scan, site.out_proj) for site in g.facts["ssm-sites"]]
        for found in attentions(g):
            if not (self.values and self._rotate_values(g, found)):
                ends.append((found.call, found.o_proj))
        ends += [(mlp.product, mlp.down_proj) for mlp in mlps(g)]
        for call, projection in ends:
            if projection is None:
                g.skip(call, "its output reaches no linear layer")
        # The scans of two directions end in one projection, and layers may share a weight.
        sharing: dict[fx.Node, list[Linear]] = {}
        for projection in dict.fromkeys(projection for _, projection in ends):
            if projection is not None:
                linear = describe(projection)
                sharing.setdefault(linear.weight, []).append(linear)
        for weight, linears in sharing.items():
            self._rotate_inputs(g, weight, linears)
        if self.residual:
            self._rotate_residual(g)

    def _rotate_inputs(self, g: Graph, weight: fx.Node, linears: list[Linear]) -> None:
        """Rotate what calls read that share a weight, if all its readers are among them."""
        agreed = weight.users.keys() <= {linear.node for linear in linears}
        if weight.op != "get_attr" or not agreed:
            reason = "computed" if agreed else "tied"
            for linear in linears:
                g.skip(linear.node, f"its weight is {reason}: {weight.target}")
            return
        block = rotation_block(g, g.param(weight).shape[-1], self.block)
        for linear in linears:
            node = linear.node
            with g.before(node):
                y = g.call("ssmc::hadamard", linear.input, block, like=node, suffix="hadamard")
            node.replace_input_with(linear.input, y)
            g.match(node)
        rotate(g, weight, block)

    def _rotate_values(self, g: Graph, found: Attention) -> bool:
        """Whether the values of this attention can be rotated, and are."""
        try:
            path = ValuePath.of(found)
        except LookupError as error:
            g.skip(found.call, f"its values are not rotated: {error.args[0]}")
            return False
        block = rotation_block(g, path.width, None)
        v_proj, o_proj = operands(path.v_proj), operands(path.o_proj)
        rotate_rows(g, v_proj["weight"], block)
        if v_proj["bias"] is not None:
            rotate(g, v_proj["bias"], block)
        rotate(g, o_proj["weight"], block)
        g.match(path.v_proj)
        g.match(path.o_proj)
        return True

    def _rotate_residual(self, g: Graph) -> None:
        stream = ResidualStream.find(g)
        block = rotation_block(g, stream.embedding.meta["val"].shape[-1], self.block)
        for param in (*stream.readers, *stream.biases):
            rotate(g, param, block)
        for writer in stream.writers:
            rotate_rows(g, writer, block)
        g.match(stream.embedding)


def rotated(value: torch.Tensor, block: int) -> torch.Tensor:
    """`value` with its last dimension rotated, [..., n]."""
    return ssmc.ops.hadamard(value.contiguous(), block)


def rotate(g: Graph, param: fx.Node, block: int) -> None:
    """Rotate the last dimension of a parameter."""
    g.set_param(param, rotated(g.param(param), block))


def rotate_rows(g: Graph, weight: fx.Node, block: int) -> None:
    """Rotate what a linear layer gives: the rows of its weight [..., N, K]."""
    g.set_param(weight, rotated(g.param(weight).mT, block).mT.contiguous())


def rotation_block(g: Graph, width: int, asked: int | None) -> int:
    """The block a rotation of `width` channels uses: the one asked for, or the largest known.

    Raises UsageError where the block asked for does not divide the width or has no known order.
    """
    block = largest_block(width) if asked is None else asked
    check_block(width, block)
    if block != width:
        g.note(f"width {width}: rotated in {width // block} blocks of {block}")
    return block
