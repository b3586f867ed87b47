"""Overrides of quantise: which operators they mean, what becomes of those, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core.tiny import KINDS, apply, context, graph, logits

from ssmc.core import Graph, make_plan, run_passes
from ssmc.core.dialect import operands
from ssmc.core.options import build_pass, parse_passes
from ssmc.core.text import graph_lines
from ssmc.errors import UsageError
from ssmc.lowering import lower
from ssmc.passes._formats import operators
from ssmc.recipe import make_recipe

from .quantised import form

FEW = "weights=4,group=8,range=mse"


def _quantised(kind: str, overrides: str, options: str = "group=8") -> Graph:
    g = graph(kind)
    apply(g, f"absmax,quantise{{{options},overrides={overrides}}}")
    return g


def _matched(pattern: str, kind: str = "mamba") -> set[str]:
    return {o.address for o in operators(graph(kind)) if o.matches(pattern)}


def _formats(g: Graph) -> dict[str, str]:
    """How each linear layer reads its input and its weight, by address."""
    found = {}
    for node in g.calls("ssmc::linear"):
        x, weight = (operands(node)[name] for name in ("x", "weight"))
        name = ".".join(str(node.meta[k]) for k in ("layer", "role") if node.meta[k] is not None)
        packed = weight.op != "get_attr" and "groups" in str(weight.target)
        bits = "float" if weight.op == "get_attr" else "w4" if packed else "w8"
        found[name] = f"{bits} {'bf16' if 'rounded' in x.name else form(g, x).split('[')[0]}"
    return found


def test_addresses() -> None:
    addresses = [o.address for o in operators(graph("mamba"))]
    parts = ("in_proj", "conv1d", "x_proj", "dt_proj", "scan", "out_proj")
    layers = [f"layer.{i}.{part}" for i in range(2) for part in parts]
    assert addresses == ["embedding", *layers, "head"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("head", {"head"}),
        ("layer.1.in_proj", {"layer.1.in_proj"}),
        ("layer.*.out_proj", {"layer.0.out_proj", "layer.1.out_proj"}),
        ("x_proj", {"layer.0.x_proj", "layer.1.x_proj"}),
        ("[xd]*_proj", {f"layer.{i}.{p}_proj" for i in (0, 1) for p in ("x", "dt")}),
        ("layers.0.mixer.scan", {"layer.0.scan"}),
        ("backbone_layers_1_mixer_in_proj", {"layer.1.in_proj"}),
        ("layer", {o.address for o in operators(graph("mamba")) if o.layer}),
        ("proj", set()),
        ("layer.0.in", set()),
    ],
)
def test_what_a_pattern_means(pattern: str, expected: set[str]) -> None:
    assert _matched(pattern) == expected


def test_a_layer_is_all_in_it_and_nothing_else() -> None:
    for kind in KINDS:
        expected = {o.address for o in operators(graph(kind)) if o.node.meta.get("layer") == 1}
        assert _matched("layer.1", kind) == _matched("layers.1.mixer", kind) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_float_changes_exactly_the_nodes_of_the_operator(kind: str) -> None:
    full, without = (_quantised(kind, o) for o in ("", "layer.1.out_proj:float"))
    name = next(o.node.name for o in operators(graph(kind)) if o.address == "layer.1.out_proj")
    before, after = (graph_lines(g, None) for g in (full, without))
    gone = before.keys() - after.keys()
    y = str(operands(graph(kind).node(name))["x"])
    (weight,) = (n for n in gone if n.startswith(f"{name}_weight"))
    assert gone == {weight} | {f"{y}_{s}" for s in ("q", "int8", "scale", "dq")}
    changed = {n for n in after if before.get(n) != after[n]}
    assert changed == {name}
    assert after.keys() <= before.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_formats_of_linear_layers(kind: str) -> None:
    overrides = "layer.0.in_proj:w4a16;layer.1.in_proj:w4a8;out_proj:w8a16;layer.1.out_proj:float"
    found = _formats(_quantised(kind, overrides))
    assert found["0.in_proj"] == "w4 bf16"
    assert found["1.in_proj"] == "w4 token"
    assert found["0.out_proj"] == "w8 bf16"
    assert found["1.out_proj"].startswith("float ")
    assert found["head"] == "w8 token"


def test_a_block_of_w4a16_among_w4a8() -> None:
    g = _quantised("mamba2", "layer.1:w4a16", FEW)
    assert _formats(g) == {
        "0.in_proj": "w4 token", "0.out_proj": "w4 token",
        "1.in_proj": "w4 bf16", "1.out_proj": "w4 bf16", "head": "w8 token",
    }  # fmt: skip
    convs, scans = g.calls("ssmc::causal_conv1d"), g.calls("ssmc::ssd_scan")
    assert [operands(n)["exact"] for n in convs] == [True, False]
    assert [form(g, operands(n)["x"]).partition("[")[0] for n in scans] == ["static", "float"]


def test_the_last_entry_decides_and_default_is_what_options_say() -> None:
    found = _formats(_quantised("mamba", "*:float;layer.0:default;layer.0.x_proj:w4a8", FEW))
    assert found.pop("0.in_proj") == found.pop("0.out_proj") == "w4 token"
    assert found.pop("0.x_proj") == "w4 static"
    assert found.pop("0.dt_proj") == "w8 token"
    assert {f.split()[0] for f in found.values()} == {"float"}


def test_an_override_goes_over_embedding_and_head() -> None:
    options = "embedding=false,head=false"
    plain, over = (
        _quantised("mamba", o, options) for o in ("scan:default", "head:w8a8;embedding:w8a8")
    )
    assert _formats(plain)["head"].startswith("float")
    assert _formats(over)["head"] == "w8 token"
    assert [form(g, g.calls("ssmc::embedding")[0].args[1])[:4] for g in (plain, over)] == [
        "floa", "int8",
    ]  # fmt: skip


def test_what_is_left_alone_says_why() -> None:
    g = graph("mamba")
    record = apply(g, "absmax,quantise{overrides=layer.0.scan:float;layer.0.conv1d:w8a16}")
    reasons = {s["node"].rpartition("mixer_")[2]: s["reason"] for s in record["quantise"].skipped}
    assert reasons == {
        "selective_scan": "float by layer.0.scan:float",
        "conv1d": "float by layer.0.conv1d:w8a16",
    }
    assert record["quantise"].notes == ["overrides: 1 float, 1 w8a16"]


def test_widths_that_do_not_divide_keep_8_bits() -> None:
    record = apply(graph("mamba"), "absmax,quantise{overrides=layer.0.in_proj:w4a8}")["quantise"]
    assert "in_proj keeps 8 bits: 40 is no multiple of 128" in record.notes


SPELLINGS: list[Any] = [
    "layer.0:w4a16;head:float",
    " layer.0:w4a16 ; head:float;",
    {"layer.0": "w4a16", "head": "float"},
    [{"layer.0": "w4a16"}, {"head": "float"}],
    ["layer.0:w4a16", "head:float"],
]


@pytest.mark.parametrize("given", SPELLINGS)
def test_spellings(given: Any) -> None:
    built = build_pass("quantise", {"overrides": given})
    assert built.options()["overrides"] == ("layer.0:w4a16", "head:float")
    assert parse_passes(str(built)) == [built]
    assert make_recipe(passes=[{"quantise": {"overrides": given}}]).plan()[-1] == built


@pytest.mark.parametrize(
    ("overrides", "message", "hint"),
    [
        ("head", "'head' is not PATTERN:FORMAT", "wNaM"),
        (":float", "':float' is not PATTERN:FORMAT", "wNaM"),
        ("head:w9a8", "'head:w9a8' is not PATTERN:FORMAT", "wNaM"),
        ("layer.0.in_prj:float", "'layer.0.in_prj' matches no operator", "layer.0.in_proj"),
        ("layer.7:float", "'layer.7' matches no operator", "layer.1"),
        ("zzz:float", "'zzz' matches no operator", "there are embedding, in_proj"),
    ],
)
def test_what_is_refused(overrides: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        _quantised("mamba", overrides)
    assert hint in str(refused.value.hint)


def test_a_pattern_is_checked_before_any_pass_runs() -> None:
    started: list[str] = []
    plan = make_plan(parse_passes("quantise{overrides=hed:float}"))
    with pytest.raises(UsageError, match="pass quantise: pattern 'hed'"):
        run_passes(graph("mamba"), plan, context(), lambda p: started.append(p.name))
    assert started == []


def test_levels_that_are_not_uniform_need_16_bit_inputs() -> None:
    with pytest.raises(UsageError, match="no integer product"):
        build_pass("quantise", {"activations": 16, "range": "tanh", "overrides": "head:w4a8"})
    with pytest.raises(UsageError, match="multiple of 8, which fill whole bytes at 3 bits"):
        build_pass("quantise", {"group": 12, "overrides": "head:w3a16"})


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_formats_are_lowered_to_the_same_bits(kind: str) -> None:
    mixed = "layer.0:w4a8;layer.0.scan:float;layer.1.in_proj:float;layer.1.conv1d:float"
    g = _quantised(kind, f"*:w8a8;{mixed}")
    lowered = lower(g, "reference")
    assert torch.equal(logits(lowered.graph), logits(g))
    kept = {entry["node"].removeprefix("backbone_") for entry in lowered.kept}
    scan = "selective_scan" if kind == "mamba" else "ssd_scan"
    assert kept == {f"layers_0_mixer_{scan}", "layers_1_mixer_in_proj", "layers_1_mixer_conv1d"}
