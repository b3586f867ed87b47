"""GPTQ on graphs: the integers it leaves, on which inputs, in which order."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from core.tiny import KINDS, apply, calibration, context, graph
from torch import Tensor, fx

import ssmc
from ssmc.core import Context, Graph, find_pass, make_plan
from ssmc.core.dialect import operands
from ssmc.core.options import parse_passes
from ssmc.corpus import read_texts, token_windows
from ssmc.demo import calibration_file
from ssmc.errors import NumericsError, PassError, UsageError
from ssmc.evaluate import perplexity
from ssmc.passes._staged import StagedRun
from ssmc.quant.formats import unpack
from ssmc.recipe import make_recipe

from .test_own_module import MODULES

PROJECTIONS = ("in_proj", "out_proj")
W4 = "quantise{weights=4,group=8,activations=16}"


def rounded(kind: str, quantise: str = W4, gptq: str = "gptq") -> tuple[Graph, Graph, Any]:
    """The graph quantised, that with GPTQ, and the record of GPTQ."""
    g = graph(kind)
    apply(g, f"hadamard,absmax,{quantise}")
    twin = graph(kind)
    return g, twin, apply(twin, f"hadamard,absmax,{quantise},{gptq}")["gptq"]


def seen(g: Graph, node: fx.Node) -> Tensor:
    """The value of a node over the calibration batches, [tokens, K]."""
    found: list[Tensor] = []
    for batch in calibration():
        g.watch(lambda n, v: found.append(v.flatten(0, 1)) if n is node else None, *batch)
    return torch.cat(found)


def changed(before: Graph, after: Graph) -> set[str]:
    """The names of the tensors that differ."""
    assert before.params().keys() == after.params().keys()
    new = after.params()
    return {n for n, t in before.params().items() if not torch.equal(t, new[n])}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "quantise",
    [
        "quantise{weights=4,group=8}",
        W4,
        "quantise{weights=3,activations=16}",
        "quantise{granularity=tensor}",
        "quantise{weights=4,group=8,activations=16,range=tanh}",
    ],
)
def test_it_changes_integers_of_projections_and_nothing_else(kind: str, quantise: str) -> None:
    before, after, record = rounded(kind, quantise)
    assert len(record.matched) == 4
    names = {name.rpartition("_")[0] for name in changed(before, after)}
    assert names == {
        f"backbone.layers.{i}.mixer.{p}.weight" for i in (0, 1) for p in ("in_proj", "out_proj")
    }
    for name, tensor in after.params().items():
        assert (tensor.dtype, tensor.shape) == (
            before.params()[name].dtype,
            before.params()[name].shape,
        )
        if name.endswith("_scale"):
            assert torch.equal(tensor.bfloat16().float(), tensor)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_err_less_on_what_the_layers_read(kind: str) -> None:
    before, after, record = rounded(kind)
    plain = graph(kind)
    apply(plain, "fold-norm,hadamard,absmax")
    for name in record.matched:
        layer = after.node(name)
        x, new = seen(after, operands(layer)["x"]), seen_weight(after, layer)
        weight = plain.param(plain.node(name).args[1])  # type: ignore[arg-type]
        nearest = seen_weight(before, before.node(name))
        left, right = ((x @ (w - weight).T).norm() for w in (new, nearest))
        assert left < 0.93 * right, name  # random layers, whose inputs hardly correlate
    (note,) = record.notes
    assert "of the squared error of nearest integers" in note


def seen_weight(g: Graph, linear: fx.Node) -> Tensor:
    twin = operands(linear)["weight"]
    args = [g.param(a) if isinstance(a, fx.Node) else a for a in twin.args]
    value: Tensor = twin.target(*args)
    return value


def test_act_order_and_damping_change_the_integers() -> None:
    _, plain, _ = rounded("mamba")
    for option in ("act_order=true", "damping=1"):
        _, other, _ = rounded("mamba", gptq=f"gptq{{{option}}}")
        name = "backbone.layers.1.mixer.in_proj.weight_int4"
        a, b = (unpack(g.params()[name], 4, 8) for g in (plain, other))
        assert 0.01 < (a != b).float().mean() < 0.8, option


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantise", ["quantise{weights=3,group=8}", W4])
def test_asymmetric_makes_up_for_what_was_lost_before(kind: str, quantise: str) -> None:
    exact = graph(kind)
    apply(exact, "fold-norm,hadamard,fold-a-log,absmax")
    errors = []
    for option in ("", "{asymmetric=true,damping=0.001}"):
        _, g, record = rounded(kind, quantise, f"gptq{option}")
        assert record.matched
        name = [n for n in record.matched if "in_proj" in n][-1]  # of a layer behind the first
        found, wanted = (seen(x, x.node(name)) for x in (g, exact))
        errors.append(((found - wanted).norm() / wanted.norm()).item())
    assert errors[1] < 0.97 * errors[0], errors


def test_sweeps_err_less_on_what_the_layers_read() -> None:
    shares = []
    for option in ("", "{sweeps=3}"):
        _, _, record = rounded("mamba2", W4, f"gptq{option}")
        shares.append(float(record.notes[0].split()[3]))
    assert shares[1] < 0.97 * shares[0], shares


def test_x_proj_and_head_where_they_are_named() -> None:
    all_layers = "quantise{scope=all,weights=4}"
    _, _, record = rounded("mamba", all_layers)
    reasons = {s["node"]: s["reason"] for s in record.skipped}
    assert reasons["lm_head"] == "head=false"
    assert reasons["backbone_layers_0_mixer_x_proj"] == "x_proj=false"
    assert reasons["backbone_layers_0_mixer_dt_proj"] == "it is a dt_proj"
    _, _, record = rounded("mamba", all_layers, "gptq{x_proj=true,head=true}")
    assert len(record.matched) == 2 * 3 + 1
    assert {"lm_head", "backbone_layers_1_mixer_x_proj"} <= set(record.matched)
    assert {s["reason"] for s in record.skipped} == {"it is a dt_proj"}


def test_a_weight_that_another_call_reads_is_left() -> None:
    before, after, record = rounded("mamba", W4, "gptq{head=true}")
    assert {"node": "lm_head", "reason": "another call reads the same weight"} in record.skipped
    assert not any("embeddings" in name for name in changed(before, after))


def test_where_the_order_of_passes_is_wrong_the_right_one_is_named() -> None:
    with pytest.raises(UsageError, match=r"impossible order: quantise .* before gptq") as caught:
        make_plan(parse_passes("gptq,quantise"))
    assert caught.value.hint == "write --passes quantise,gptq"
    with pytest.raises(UsageError, match=r"impossible order: percentile .* before gptq"):
        make_plan(parse_passes("gptq,percentile"))


@pytest.mark.parametrize("scheme", ["w4a8", "w4a16", "w3a16", "w2a16", "w8a16", "w8a8"])
def test_the_scheme_comes_before_it(scheme: str) -> None:
    plan = make_recipe(passes="hadamard,percentile,gptq", scheme=scheme).plan()
    assert [p.name for p in plan][-3:] == ["percentile", "quantise", "gptq"]


def test_what_it_needs_is_said() -> None:
    with pytest.raises(PassError, match="no pass left weights") as caught:
        find_pass("gptq")().run(graph("mamba"), context())
    assert caught.value.hint == "name quantise before it"
    for option in ("damping=-1", "damping=nan"):
        with pytest.raises(UsageError, match=r"gptq\{damping=.*at least 0"):
            parse_passes(f"gptq{{{option}}}")
    with pytest.raises(UsageError, match="sweeps is at least 0"):
        parse_passes("gptq{sweeps=-1}")
    with pytest.raises(UsageError, match="no option 'actorder'") as unknown:
        parse_passes("gptq{actorder=true}")
    assert unknown.value.hint == "did you mean act_order?"


def test_too_little_text_without_damping_names_the_layer() -> None:
    g, few = graph("mamba"), calibration()[0][0][:1, :8]
    with pytest.raises(NumericsError) as caught:
        apply(g, f"absmax,{W4},gptq{{damping=0}}", Context([(few,)], (few,)))
    assert str(caught.value).startswith("pass gptq: backbone_layers_0_mixer_in_proj: the Hessian")
    assert "damping" in (caught.value.hint or "")


def test_without_calibration_text_it_says_so() -> None:
    g = graph("mamba")
    apply(g, f"absmax,{W4}")
    with pytest.raises(UsageError, match="no calibration text"):
        find_pass("gptq")().run(g, Context())


@pytest.mark.parametrize("name", ["one way", "classifier"])
def test_a_module_of_ones_own(name: str) -> None:
    passes = f"absmax,{W4.replace('group=8', 'group=4')},gptq{{x_proj=true,head=true}}"
    given = {"example_inputs": torch.randn(2, 9, 12), "calibration": torch.randn(16, 9, 12)}
    compiled = ssmc.compile(MODULES[name](), passes=passes, **given)  # type: ignore[arg-type]
    assert compiled.graph.facts == {}  # which held the weights in float
    record = compiled.report["passes"][-1]
    assert len(record["matched"]) == (3 if name == "one way" else 4)
    assert record["skipped"] == []
    assert record["error"] > 0


# -- running from layer to layer ------------------------------------------------------------------


def test_a_staged_run_gives_every_layer_the_values_of_a_whole_one() -> None:
    for kind in KINDS:
        g = graph(kind)
        apply(g, "hadamard,absmax,quantise")
        linears = g.calls("ssmc::linear")
        staged = [
            (linear, torch.cat([x.flatten(0, 1) for x in batches]))
            for linear, batches in StagedRun(g, linears, context()).inputs()
        ]
        assert [linear for linear, _ in staged] == linears
        for linear, x in staged:
            assert torch.equal(x, seen(g, operands(linear)["x"]))


def test_layers_behind_see_the_weights_that_layers_before_were_given() -> None:
    g = graph("mamba")
    apply(g, f"absmax,{W4}")
    first, *_, last = [n for n in g.calls("ssmc::linear") if n.meta["role"] == "in_proj"]
    before = seen(g, operands(last)["x"])
    for linear, batches in StagedRun(g, [first, last], context()).inputs():
        xs = torch.cat([x.flatten(0, 1) for x in batches])
        if linear is first:
            scale = operands(operands(first)["weight"])["scale"]
            g.set_param(scale, g.param(scale) * 0.5)
    assert torch.equal(xs, seen(g, operands(last)["x"]))
    assert not torch.equal(xs, before)


def test_what_no_call_reads_any_more_is_dropped() -> None:
    g = graph("mamba")
    linears = [n for n in g.calls("ssmc::linear") if n.meta["role"] == "in_proj"]
    run = StagedRun(g, linears, context())
    held = []
    for _, batches in run.stages():
        *_, values = batches
        held.append({n for n in values if n.op == "call_function"})
    first, last = held  # of the last block the residual stream is read behind the layer only
    assert (len(first), len(last)) == (2, 1), held


# -- a trained model -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> tuple[Graph, Context, Tensor]:
    """The embedded model, text to calibrate on, and text it has not seen."""
    model = ssmc.load_model("demo")
    assert model.tokenizer is not None
    assert model.eos_token_id is not None
    texts = read_texts(calibration_file())
    windows = token_windows(model.tokenizer, texts, model.eos_token_id, 128, "demo")[:28]
    batches = [(part,) for part in windows[:24].split(8)]
    g = ssmc.trace(model.module)
    apply(g, "hadamard,absmax", Context(batches, (windows[:1, :32],)))
    return g, Context(batches, None), windows[24:]


def layer_error(g: Graph, reference: Graph, x: Tensor) -> dict[str, float]:
    """For each projection, the relative error of its output on the inputs of the reference."""
    layers = [n for n in reference.calls("ssmc::linear") if n.meta["role"] in PROJECTIONS]
    found: dict[str, float] = {}

    def look(node: fx.Node, value: Any) -> None:
        inputs[node.name] = value

    inputs: dict[str, Any] = {}
    reference.watch(look, x)
    for node in layers:
        given = inputs[operands(node)["x"].name]
        expected = given @ reference.param(operands(node)["weight"]).T
        got = given @ seen_weight(g, g.node(node.name)).T
        found[node.name] = ((got - expected).norm() / expected.norm()).item()
    return found


def test_layers_of_a_trained_model_err_less_on_text_seen_and_unseen(
    demo: tuple[Graph, Context, Tensor],
) -> None:
    g, given, unseen = demo
    ((seen_text,), *_) = given.calibration
    errors = []
    for passes in ("", ",gptq"):
        twin = g.copy()
        apply(twin, f"absmax,quantise{{weights=4,group=128,activations=16}}{passes}", given)
        errors.append([layer_error(twin, g, text) for text in (seen_text, unseen)])
    seen_ratios, ratios = (
        [after[name] / error for name, error in before.items()]
        for before, after in zip(*errors, strict=True)
    )
    assert len(ratios) == 16
    assert max(seen_ratios) < 0.9, seen_ratios
    assert sum(seen_ratios) / 16 < 0.75, seen_ratios
    assert sum(ratios) / 16 < 0.9, ratios


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mamba-5m", "mamba2-6m"])
def test_perplexity_of_unseen_text_in_3_bits(
    name: str, shared_model: Callable[[str], Path], shared_data: Callable[[str], Path]
) -> None:
    model = ssmc.load_model(str(shared_model(name)))
    assert model.tokenizer is not None
    assert model.eos_token_id is not None
    seen_text, unseen = (
        token_windows(model.tokenizer, read_texts(shared_data(file)), model.eos_token_id, 256, file)
        for file in ("calib512.jsonl", "test.jsonl")
    )
    given = Context([(part,) for part in seen_text[:32].split(8)])
    traced = ssmc.trace(model.module)
    losses = [math.log(perplexity(traced, unseen[:8]).perplexity)]
    for passes in ("", ",gptq"):
        twin = traced.copy()
        options = "{weights=3,group=128,activations=16}"
        apply(twin, f"hadamard,absmax,quantise{options}{passes}", given)
        losses.append(math.log(perplexity(twin, unseen[:8]).perplexity))
    full, nearest, rounded = losses
    assert rounded - full < 0.9 * (nearest - full), losses
