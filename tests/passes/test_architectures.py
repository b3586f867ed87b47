"""One plan for every architecture: rewrites stay exact, and lowered is simulated, bit by bit."""

from __future__ import annotations

import pytest
from core.tiny import error
from frontend.models import ARCHITECTURES, build, tokens
from tiny import compile_tiny

from ssmc.core import Context, make_plan, run_passes
from ssmc.core.dialect import operands
from ssmc.core.options import parse_passes
from ssmc.frontend import trace
from ssmc.runtime.verify import verify

REWRITES = "fold-norm,hadamard{residual=true},smooth,fold-a-log"
LAST = ("out_proj", "o_proj", "down_proj")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rewrites(architecture: str) -> None:
    g = trace(build(architecture))
    batch = (tokens(4, 33),)
    expected, _ = g(*batch)
    report = run_passes(g, make_plan(parse_passes(REWRITES)), Context([batch], batch))
    assert error(g(*batch)[0], expected) < 1e-5
    records = {record.name: record for record in report.records}
    assert records["hadamard"].skipped == []
    rotated = [n for n in g.nodes if n.meta.get("role") in LAST]
    assert len(g.calls("ssmc::hadamard")) == len(rotated)
    assert all(operands(n)["x"].target is g.calls("ssmc::hadamard")[0].target for n in rotated)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_everything_in_eight_bits(architecture: str) -> None:
    compiled = compile_tiny(architecture, "hadamard{residual=true},percentile,quantise,kv-cache")
    assert compiled.lowered.kept == []
    found = verify(compiled, tokens(2, 21))
    assert {c.form for c in found} == {"sequence", "step"}
    assert all(c.differing == 0 and c.error == 0 for c in found)
    assert compiled.about["metrics"]["probe_signal_to_noise_db"] > 20
