"""The sizes that count: Mamba-130m, and small models of each kind."""

from __future__ import annotations

from collections.abc import Iterator

from cpu_cases import jamba, mamba, mamba2
from cpu_cases.case import Case

PROMPT = 512

MAMBA_130M = mamba.Mamba("Mamba-130m", 768, 1536, 48, 16, 24, 50280)
MAMBA_5M = mamba.Mamba("mamba-5m", 256, 512, 16, 16, 8, 8192)
MAMBA2_6M = mamba2.Mamba2("mamba2-6m", 256, 8, 64, 128, 8)
JAMBA_11M = jamba.Jamba(
    mamba.Mamba("jamba-11m", 256, 512, 16, 16, 6, 8192),
    heads=4, groups=2, head=64, experts=4, chosen=2, inner=384, attentions=2, mixtures=4,
)  # fmt: skip


def cases() -> Iterator[Case]:
    """Prompts, then steps of one token."""
    yield from mamba.prompt(MAMBA_130M, PROMPT)
    yield from mamba.prompt(MAMBA_5M, PROMPT)
    yield from mamba2.prompt(MAMBA2_6M, PROMPT)
    yield from jamba.prompt(JAMBA_11M, PROMPT)
    yield from mamba.step(MAMBA_130M)
    yield from mamba.step(MAMBA_5M)
    yield from mamba2.step(MAMBA2_6M)
    yield from jamba.step(JAMBA_11M, PROMPT)
    yield from jamba.llama("llama-6m", heads=4, head=64, inner=640, layers=6, length=PROMPT)
