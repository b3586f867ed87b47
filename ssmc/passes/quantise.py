"""Quantise weights to 8 bits and fewer, and activations to 8, to bfloat16, or not at all."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ssmc.core import Context, Graph, Pass, register
from ssmc.errors import UsageError
from ssmc.passes._formats import Bits, Overrides, choose, read_override
from ssmc.passes._quantising import Options, Quantising
from ssmc.quant.formats import columns_packed


@register
@dataclass(frozen=True)
class Quantise(Options, Pass):
    """W8A8: every linear layer, the convolution, the scan's operands, embedding and head.

    Replaces:  linear(x, W)
    With:      linear(dequantize(quantize(x, s), s), dequantize(W_int8, s_W), exact)

    `granularity=free` takes every scale that costs nothing at run time: static and per channel
    for what is elementwise between in_proj and out_proj (x, z, u, dt; that of u goes into the
    columns of x_proj), dynamic and per token for what a kernel holds a row of (inputs of all other
    linear layers, B, C), and per output channel for weights.
    `margin` widens those per channel: what one channel reached on the calibration text it exceeds
    on another text more often than a whole tensor does. `granularity=tensor` takes one static
    scale a tensor, as Quamba does (Chiang et al. 2024, arXiv 2410.13229, section 4), or one for
    each cluster of sort-and-cluster, where that ran. `granularity=token` quantises linear layers
    and embedding alone, with a dynamic scale for each token that a layer reads, as is usual for
    transformers; convolution and scan stay in float. `weight_scale=tensor` or `row` is what shares
    a scale in weights, by default a tensor with granularity=tensor, else a row. A, D, dt_bias,
    norms, biases and states stay float32. `embedding` and `head` leave those in float where false.

    `weights` is the bits, 2 to 8, of every linear layer but x_proj, dt_proj, router and head, with
    `scope=all` of these as well; `group` input channels share a scale (Frantar et al. 2023, arXiv
    2210.17323, section 5), without it a row or tensor. Other layers, and those whose width is no
    multiple of it, keep 8 bits. `range=mse` clips these weights where their squared error is least,
    and uses every integer of so many bits, with the sign of the scale that serves best;
    `range=tanh` clips them at three standard deviations, with levels spaced by a hyperbolic
    tangent (`ssmc/quant/weights.py`).

    `activations=16` quantises weights only: nothing is int8 between layers, and the linear layers
    round their inputs to bfloat16, in which every kernel for such weights multiplies. Layers out of
    scope stay in float; the head reads 8 bits, those of the embedding where it is tied to it.

    `overrides` gives single operators other formats, as PATTERN:FORMAT with `;` between them:
    `layer.3:w4a16;out_proj:w4a8;head:float`. A pattern is a role, a layer, both (`layer.3.in_proj`)
    or a path of modules, each part with wildcards; the last that matches decides, whatever `scope`,
    `embedding` and `head` say. A format is wNaM (N bits of the weight, 2 to 8, M of the inputs, 8
    or 16), `float`, or `default` (what the other options say). Fewer than 8 bits come in groups of
    `group` or 128, with `range=mse` where no range is given. Choosing bits for each block is W4AX
    of Quamba2 (Chiang et al. 2025, arXiv 2503.22879). Embedding and convolution have
    8 bits or none, as has the scan, which a16 leaves in float.
    """

    name = "quantise"
    stage = "quantise"
    needs = ("ssm-sites", "linears", "fold-norm", "fold-a-log", "absmax")
    exact_to = None
    overrides: Overrides = ()

    def __post_init__(self) -> None:
        if not self.margin >= 1:
            raise UsageError(f"quantise{{margin={self.margin}}}: margin must be at least 1")
        if not 2 <= self.weights <= 8:
            raise UsageError(
                f"quantise{{weights={self.weights}}}: weights has 2 to 8 bits",
                hint="8 and 4 have kernels of their own",
            )
        if self.activations not in (8, 16):
            raise UsageError(
                f"quantise{{activations={self.activations}}}: activations has 8 or 16 bits",
                hint="16 quantises weights only",
            )
        named = [override.bits for override in map(read_override, self.overrides)]
        few = [bits for bits in named if bits and bits.weights < 8]
        own = Bits(self.weights, self.activations)
        if self.range == "tanh" and any(bits.activations == 8 for bits in (own, *few)):
            raise UsageError(
                "quantise{range=tanh}: no integer product has levels that are not uniform",
                hint="add activations=16, or leave range=tanh out",
            )
        for bits in (own, *few):
            self._check_group(bits.weights)

    def _check_group(self, bits: int) -> None:
        multiple = columns_packed(bits)
        if self.group is not None and (self.group < 2 or self.group % multiple):
            raise UsageError(
                f"quantise{{group={self.group}}}: group must be at least 2 and a multiple of "
                f"{multiple}, which fill whole bytes at {bits} bits",
                hint="common groups are 32, 64 and 128; group=none is one scale a row",
            )

    def check(self, g: Graph) -> None:
        """UsageError for an override that matches no operator of `g`."""
        choose(self.overrides, g)

    def run(self, g: Graph, context: Context) -> None:
        """Quantise in execution order: embedding, sites, linear layers."""
        g.facts["float"] = g.copy()
        chosen = choose(self.overrides, g)
        g.facts[self.name] = Quantising(self, g, chosen).run()
        if chosen:
            counts = Counter(override.format for override in chosen.values()).items()
            g.note(f"overrides: {', '.join(f'{count} {form}' for form, count in counts)}")
