"""The quantised graph: every operand through 8 bits, with the scales that are promised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core.tiny import KINDS, VOCABULARY, WIDTH, apply, error, graph, logits, values

from ssmc.core import Graph, find_pass, is_call
from ssmc.core.dialect import operands
from ssmc.errors import PassError, UsageError
from ssmc.quant.formats import dequantize_tensor, quantize_weight, scale_for

from .quantised import form, raw_value

INNER = 2 * WIDTH
STATE, RANK, HEADS = 8, 3, WIDTH // 4
CONV2 = INNER + 2 * STATE


def _quantised(kind: str, options: str = "", passes: str = "hadamard,percentile,") -> Graph:
    g = graph(kind)
    apply(g, f"{passes}quantise{options}")
    return g


def _linear(g: Graph, role: str) -> list[str]:
    forms = {
        " ".join(form(g, n.args[i]) for i in (0, 1))
        for n in g.calls("ssmc::linear")
        if n.meta["role"] == role
    }
    (only,) = forms  # the same in every layer
    return only.split(" ", 1)


def _forms(g: Graph) -> dict[str, Any]:
    """The form of every operand that item by item is to be quantised."""
    scans = g.calls("ssmc::selective_scan") + g.calls("ssmc::ssd_scan")
    found: dict[str, Any] = {}
    for role in {n.meta["role"] for n in g.calls("ssmc::linear")}:
        found[role] = _linear(g, role)
    for args in map(operands, scans):
        found |= {name: form(g, args[name]) for name in args.keys() & {*"uxBCz", "dt"}}
    for norm in g.calls("ssmc::rms_norm_gated"):
        found["gate"] = form(g, norm.args[1])
    for conv in g.calls("ssmc::causal_conv1d"):
        found["conv"] = [form(g, conv.args[0]), form(g, conv.args[1])]
    (embedding,) = g.calls("ssmc::embedding")
    return found | {"embedding": form(g, embedding.args[1])}


def _weight(rows: int) -> str:
    return f"int8[{rows},1]".replace(",", ", ")


FREE: dict[str, dict[str, Any]] = {
    "mamba": {
        "in_proj": ["token", _weight(2 * INNER)],
        "x_proj": ["static[]", _weight(RANK + 2 * STATE)],
        "dt_proj": ["token", _weight(INNER)],
        "out_proj": ["token", _weight(WIDTH)],
        "head": ["token", _weight(VOCABULARY)],
        "embedding": _weight(VOCABULARY),
        "conv": [f"static[{INNER}]", _weight(INNER)],
        **dict.fromkeys(("u", "dt", "z"), f"static[{INNER}]"),
        **dict.fromkeys("BC", "token"),
    },
    "mamba2": {
        "in_proj": ["token", _weight(INNER + CONV2 + HEADS)],
        "out_proj": ["token", _weight(WIDTH)],
        "head": ["token", _weight(VOCABULARY)],
        "embedding": _weight(VOCABULARY),
        "conv": [f"static[{CONV2}]", _weight(CONV2)],
        "x": f"static[{HEADS}, 8]",
        "dt": f"static[{HEADS}]",
        "gate": f"static[{INNER}]",
        **dict.fromkeys("BC", "token"),
    },
}


def _per_tensor(value: Any) -> Any:
    if isinstance(value, list):
        return [_per_tensor(part) for part in value]
    return "int8[]" if value.startswith("int8") else "static[]"


@pytest.mark.parametrize("kind", KINDS)
def test_free_granularity(kind: str) -> None:
    assert _forms(_quantised(kind)) == FREE[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_tensor_granularity(kind: str) -> None:
    g = _quantised(kind, "{granularity=tensor}")
    assert _forms(g) == {name: _per_tensor(value) for name, value in FREE[kind].items()}
    assert not g.calls("ssmc::quantize_dynamic")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularity", ["free", "tensor"])
def test_what_stays_float(kind: str, granularity: str) -> None:
    g = _quantised(kind, f"{{granularity={granularity}}}")
    kept = {n.rpartition(".")[2] for n, v in g.params().items() if v.dtype == torch.float32}
    scales = {n for n in kept if n.endswith("_scale")}
    assert scales == {"weight_scale"}
    names = {"A", "D", "bias"} if kind == "mamba" else {"A", "D", "bias", "dt_bias", "weight"}
    norms = {"weight"}  # of the final norm in front of the tied head, or of the gated norm
    static = {n for n in g.params() if n.startswith("scales.")}
    assert kept - scales - {n.rpartition(".")[2] for n in static} == names | norms
    integers = [n for n, v in g.params().items() if v.dtype == torch.int8]
    assert len(integers) == (1 + 2 * 5 if kind == "mamba" else 2 + 2 * 3)


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_exact(kind: str) -> None:
    g = _quantised(kind)
    for n in [*g.calls("ssmc::linear"), *g.calls("ssmc::causal_conv1d")]:
        assert operands(n)["exact"] is True


def test_u_is_folded_into_x_proj() -> None:
    plain = graph("mamba")
    apply(plain, "fold-norm,fold-a-log,percentile")
    g = plain.copy()
    apply(g, "percentile,quantise{margin=1}")
    for i in range(2):
        mixer = f"backbone_layers_{i}_mixer"
        scan, x_proj = g.calls("ssmc::selective_scan")[i], g.node(f"{mixer}_x_proj")
        u, folded = scan.args[0], x_proj.args[0]
        assert folded.args[0] is u.args[0]  # type: ignore[union-attr]
        assert g.param(folded.args[1]) == 1  # type: ignore[union-attr, arg-type]
        weight, scale = x_proj.args[1].args  # type: ignore[union-attr]
        original = plain.params()[f"backbone.layers.{i}.mixer.x_proj.weight"]
        expected, s = quantize_weight(original * g.param(u.args[1]))  # type: ignore[union-attr, arg-type]
        assert torch.equal(g.param(weight), expected)  # type: ignore[arg-type]
        assert torch.equal(g.param(scale), s)  # type: ignore[arg-type]


def test_x_proj_reads_u_itself_per_tensor() -> None:
    g = _quantised("mamba", "{granularity=tensor}")
    for i, scan in enumerate(g.calls("ssmc::selective_scan")):
        assert g.node(f"backbone_layers_{i}_mixer_x_proj").args[0] is scan.args[0]


@pytest.mark.parametrize("granularity", ["free", "tensor"])
def test_weights_and_static_scales_are_the_definition(granularity: str) -> None:
    plain = graph("mamba2")
    apply(plain, "fold-norm,fold-a-log,absmax")
    g = plain.copy()
    apply(g, f"absmax,quantise{{granularity={granularity},margin=1.25}}")
    per = "channel" if granularity == "free" else "tensor"
    for name, weight in plain.params().items():
        if f"{name}_int8" in g.params():
            q, scale = quantize_weight(weight, per)  # type: ignore[arg-type]
            assert torch.equal(g.params()[f"{name}_int8"], q)
            assert torch.equal(g.params()[f"{name}_scale"], scale)
    statics = g.calls("ssmc::quantize")
    measured = values(plain, *(n.args[0].name for n in statics))  # type: ignore[union-attr]
    for n in statics:
        magnitude = measured[n.args[0].name].abs()  # type: ignore[union-attr]
        largest = magnitude.flatten(0, 2).amax(0) * 1.25 if per == "channel" else magnitude.max()
        assert torch.equal(g.param(n.args[1]), scale_for(largest))  # type: ignore[arg-type]


def test_default_margin_widens_static_scales_per_channel_only() -> None:
    margin = find_pass("quantise")().options()["margin"]
    assert margin > 1
    for granularity, factor in (("free", margin), ("tensor", 1.0)):
        wide, tight = (
            _quantised("mamba", f"{{granularity={granularity}{m}}}", "absmax,")
            for m in ("", ",margin=1")
        )
        for name, scale in tight.params().items():
            if name.startswith("scales.") and name != "scales.unit":
                # both are rounded up to 8 significant bits
                torch.testing.assert_close(
                    wide.params()[name], scale * factor, rtol=2**-7 + 1e-6, atol=0
                )


@pytest.mark.parametrize("margin", [0.99, 0, -1, float("nan")])
def test_margin_below_one_is_refused(margin: float) -> None:
    with pytest.raises(UsageError, match=r"margin must be at least 1"):
        apply(graph("mamba"), f"quantise{{margin={margin}}}")


@pytest.mark.parametrize("embedding", [True, False])
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_embedding_and_head_options(kind: str, embedding: bool, head: bool) -> None:
    g = graph(kind)
    options = f"{{embedding={str(embedding).lower()},head={str(head).lower()}}}"
    record = apply(g, f"absmax,quantise{options}")["quantise"]
    (lookup,), lm_head = g.calls("ssmc::embedding"), g.node("lm_head")
    assert is_call(lookup.args[1], "ssmc::dequantize") == embedding
    assert is_call(lm_head.args[0], "ssmc::dequantize") == head
    assert is_call(lm_head.args[1], "ssmc::dequantize") == head
    reasons = [s["reason"] for s in record.skipped]
    assert reasons == ["embedding=false"] * (not embedding) + ["head=false"] * (not head)
    if kind == "mamba":  # tied
        assert (lookup.args[1] is lm_head.args[1]) == (embedding == head)
        kept = [n for n in g.params() if n.startswith("backbone.embeddings.weight")]
        both = {"backbone.embeddings.weight_int8", "backbone.embeddings.weight_scale"}
        expected = both if embedding or head else set()
        expected |= set() if embedding and head else {"backbone.embeddings.weight"}
        assert set(kept) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_error_of_the_result(kind: str) -> None:
    g = graph(kind)
    apply(g, "fold-norm,fold-a-log")
    expected, errors = logits(g), {}
    for granularity in ("free", "tensor"):
        twin = g.copy()
        options = f"{{granularity={granularity}}}"
        record = apply(twin, f"hadamard,percentile,quantise{options}")["quantise"]
        errors[granularity] = error(logits(twin), expected)
        assert record.error == pytest.approx(errors[granularity], rel=1e-3)
    assert 1e-3 < errors["free"] < 0.05
    assert errors["free"] < errors["tensor"] < 0.2


def test_values_are_within_half_a_step() -> None:
    g = _quantised("mamba", "{margin=1}", "absmax,")
    for n in g.calls("ssmc::quantize"):
        (twin,) = [u for u in n.users if g.param(u.args[1]) is g.param(n.args[1])]  # type: ignore[arg-type]
        scale = g.param(n.args[1])  # type: ignore[arg-type]
        raw = raw_value(twin)
        seen = values(g, raw.name, twin.name)
        step = ((seen[raw.name] - seen[twin.name]).abs() / scale).max()
        # the scales were measured before anything was rounded: a value may exceed its range
        assert step < 8 if "dt" in n.name else step < 20
        inside = seen[raw.name].abs() <= 127 * scale
        assert (((seen[raw.name] - seen[twin.name]).abs() / scale)[inside] < 0.5 + 1e-3).all()


def test_each_value_is_quantised_once() -> None:
    g = _quantised("mamba")
    quantisers = [*g.calls("ssmc::quantize"), *g.calls("ssmc::quantize_dynamic")]
    sources = [n.args[0] for n in quantisers]
    assert len(set(sources)) == len(sources)
    assert len(g.calls("ssmc::quantize")) == 2 * 4  # x, z, u, dt
    assert len(g.calls("ssmc::quantize_dynamic")) == 2 * 5 + 1  # in, dt_low, B, C, out; head


def test_without_ranges_it_says_what_is_missing() -> None:
    g = graph("mamba")
    apply(g, "linears")
    with pytest.raises(PassError, match="no range was measured for") as caught:
        find_pass("quantise")().run(g, None)  # type: ignore[arg-type]
    assert caught.value.hint == "name absmax or percentile"


def test_dequantised_weights_are_near_the_originals() -> None:
    g = graph("mamba2")
    weight = g.params()["backbone.layers.0.mixer.out_proj.weight"]
    apply(g, "absmax,quantise")
    q, scale = (
        g.params()[f"backbone.layers.0.mixer.out_proj.weight_{s}"] for s in ("int8", "scale")
    )
    largest = weight.abs().amax(1, keepdim=True)
    assert ((dequantize_tensor(q, scale) - weight).abs() <= largest / 127 * 0.51).all()
