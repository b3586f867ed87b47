"""The commands on models that are not Mamba alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import write_model

from .conftest import Call, legible

ARCHITECTURES = ["llama", "jamba"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_command(call: Call, architecture: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / architecture, architecture)
    text, out = folder / "text.txt", tmp_path / "out"
    options = ("--calibration", text, "--samples", 4, "--length", 32)
    passes = "hadamard{residual=true},smooth,percentile,quantise,kv-cache"
    ended = call("compile", folder, "--passes", passes, *options, "-o", out)
    assert any(line.startswith("kv-cache") for line in ended.out.splitlines()), ended.err
    score = ("--text", text, "--window", 20, "--limit", 4, "--json")
    exact, rounded = (call("eval", target, *score).json["perplexity"] for target in (folder, out))
    assert rounded == pytest.approx(exact, rel=0.05)
    stepwise = call("eval", out, *score, "--mode", "recurrent").json["perplexity"]
    assert stepwise == pytest.approx(rounded, rel=0.01)
    made = call("generate", out, "--prompt", "w3 w5", "--tokens", 6, "--json").json
    assert made["text"]
    assert "ssmc::attention(" in call("inspect", out, "--layer", 2).out
    assert legible(call("inspect", out, "--numerics"))
    assert call("verify", out).code == 0
    few = call(
        "compile",
        folder,
        "--scheme",
        "w4a16",
        "--passes",
        "hadamard,gptq",
        *options,
        "-o",
        tmp_path / "few",
    )
    assert few.code == 0, few.err
