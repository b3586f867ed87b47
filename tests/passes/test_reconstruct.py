"""Training selective parameters for states of few bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core.tiny import KINDS, apply, calibration, context, error, graph, make_pass
from frontend.models import build, tokens
from torch import Tensor, fx

import ssmc
from ssmc.core import Context, Graph, Pass, is_call, make_plan
from ssmc.core.dialect import operands
from ssmc.core.options import parse_passes
from ssmc.corpus import read_texts, token_windows
from ssmc.demo import calibration_file, evaluation_file
from ssmc.errors import UsageError
from ssmc.frontend import trace
from ssmc.passes._blocks import Stream, blocks, plain
from ssmc.passes._fit import Fit, Schedule
from ssmc.passes._rows import rows_behind
from ssmc.passes._selective import selective_params
from ssmc.passes._simulated_scan import simulated_scan
from ssmc.passes.reconstruct import Reconstruct
from ssmc.passes.ssm_sites import SCANS, Site
from ssmc.quant.state import round_state_tensor

COARSE = "scales=tensor,steps=16,length=31,windows=12,patience=2"


def prepared(kind: str) -> Graph:
    g = graph(kind)
    apply(g, "fold-a-log")
    return g


def sites(g: Graph) -> list[Site]:
    apply(g, "ssm-sites")
    found: list[Site] = g.facts["ssm-sites"]
    return found


# -- parts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_simulated_scans_round_as_the_state_pass_does_token_by_token(kind: str) -> None:
    g = prepared(kind)
    scan = next(n for n in g.nodes if is_call(n, *SCANS))
    seen: dict[fx.Node, Any] = {}
    (ids,) = context().probe or ()
    g.watch(lambda node, value: seen.update({node: value}), ids[:, :12])
    args = fx.map_arg(scan.args, seen.__getitem__)
    y, _ = simulated_scan(scan, args, lambda h, t: round_state_tensor(h, 4, "decoupled", 8))
    places = list(operands(scan))
    given = dict(zip(places, args, strict=True))
    expected, state = [], given["state"]
    for t in range(12):
        cut = {
            k: v[:, t : t + 1] if k in ("u", "x", "dt", "B", "C", "z") and v is not None else v
            for k, v in given.items()
        }
        part, h = scan.target(*(cut | {"state": state}).values())  # type: ignore[operator]
        state = round_state_tensor(h, 4, "decoupled", 8)
        expected.append(part)
    assert error(y, torch.cat(expected, 1)) < 1e-5
    assert error(y, given_output(scan, seen)) > 1e-4


def given_output(scan: fx.Node, seen: dict[fx.Node, Any]) -> Tensor:
    value: Tensor = seen[scan][0]
    return value


@pytest.mark.parametrize("kind", KINDS)
def test_selective_parameters(kind: str) -> None:
    g = prepared(kind)
    (site, _) = sites(g)
    block = next(b for b in blocks(g) if site.scan in b.scans)
    found = {str(n.target): m for n, m in selective_params(g, block.calls, [site]).items()}
    layer = "backbone.layers.0."
    common = {"norm.weight", "mixer.conv1d.weight", "mixer.conv1d.bias"}
    own = {
        "mamba": {"mixer.x_proj.weight", "mixer.dt_proj.weight", "mixer.dt_proj.bias"},
        "mamba2": {"mixer.in_proj.weight", "mixer.dt_bias", "mixer.norm.weight"},
    }
    assert set(found) == {layer + name for name in common | own[kind]}
    if kind == "mamba2":
        check_rows(found[layer + "mixer.in_proj.weight"], site)


def check_rows(mask: Tensor, site: Site) -> None:
    """The rows that give B, C and dt are trained, and no others."""
    trained = mask.all(1)
    for value, wanted in {"u": 0, "z": 0, "B": 1, "C": 1, "dt": 1}.items():
        rows = rows_behind(getattr(site, value))
        assert rows is not None
        assert (trained[rows.start : rows.stop] == wanted).all(), value


def test_selective_parameters_behind_multipliers() -> None:
    g = trace(build("falcon-h1"))
    site, *_ = sites(g)
    block = next(b for b in blocks(g) if site.scan in b.scans)
    found = {str(n.target): m for n, m in selective_params(g, block.calls, [site]).items()}
    check_rows(found["model.layers.0.mamba.in_proj.weight"], site)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_one_after_the_other_are_the_model(kind: str) -> None:
    g = prepared(kind)
    (ids,) = calibration()[0]
    seen: dict[fx.Node, Any] = {}
    g.watch(lambda node, value: seen.update({node: value}), ids)
    stream, order = Stream(g, [ids], 3), blocks(g)
    assert [len(block.scans) for block in order if block.scans] == [1, 1]
    for number, block in enumerate(order):
        stream.advance(block, g.params())
        assert all(error(stream.values[n], seen[n]) < 1e-6 for n in block.outputs)
        stream.forget({node for later in order[number + 1 :] for node in later.calls})
        # Only the residual stream goes on to the next block.
        assert len(stream.values) == (1 if number + 1 < len(order) else 0)


# -- the fit ----------------------------------------------------------------------------------


def perturbed_fit(kind: str) -> tuple[Fit, dict[str, Tensor]]:
    """The first block with a scan, its selective parameters disturbed; and what they were."""
    g = prepared(kind)
    (site, _) = sites(g)
    streams = [Stream(g, [calibration()[0][0]], 4) for _ in range(2)]
    for block in blocks(g):
        streams[0].advance(block, g.params())
        if block.scans:
            break
        streams[1].advance(block, g.params())
    params = g.params()
    masks = {str(n.target): m for n, m in selective_params(g, block.calls, [site]).items()}
    noise = {name: 0.3 * mask * torch.randn_like(mask) for name, mask in masks.items()}
    disturbed = params | {name: params[name] * (1 + noise[name]) for name in masks}
    return Fit(block, disturbed, masks, streams[1], streams[0], lambda number: plain), params


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_finds_back_and_leaves_what_is_masked(kind: str) -> None:
    fit, params = perturbed_fit(kind)
    steps: list[int] = []
    draw = torch.Generator().manual_seed(0)
    best, before, after = fit.run(Schedule(160, 3e-3, 3, 99), draw, steps.append)
    assert after < 0.5 * before, (before, after)
    assert steps == list(range(1, 161))
    assert set(best) == set(fit.masks)
    for name, mask in fit.masks.items():
        assert torch.equal(best[name][mask == 0], params[name][mask == 0])
        assert not torch.equal(best[name], fit.params[name])


def test_the_same_draws_give_the_same_and_others_others() -> None:
    fit, _ = perturbed_fit("mamba2")
    a, b, c = (
        fit.run(Schedule(4, 3e-3, 2, 9), torch.Generator().manual_seed(seed), lambda done: None)[0]
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a)


# -- the pass ---------------------------------------------------------------------------------


def test_patience_ends_it_and_nothing_is_kept_that_does_not_help() -> None:
    seen: list[tuple[int, int]] = []
    given = context()
    given.progress = lambda done, total: seen.append((done, total))
    g = prepared("mamba")
    before = g.params()
    record = apply(g, f"reconstruct{{{COARSE},lr=9}}", given)["reconstruct"]
    assert record.matched == []
    assert all("no step helped" in s["reason"] for s in record.skipped)
    assert all(torch.equal(value, before[name]) for name, value in g.params().items())
    steps = [done for done, total in seen if total == 16 * len(blocks(g))]
    assert len(steps) == 2 * 4  # two blocks; a look every two steps, and two without a gain


@pytest.mark.parametrize(
    "options",
    [{"bits": 16}, {"steps": 0}, {"lr": 0.0}, {"windows": 1}, {"length": 1}, {"patience": 0}],
)
def test_refused_options(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="reconstruct"):
        Reconstruct(**options)


def test_needs_two_windows() -> None:
    given = Context([(calibration()[0][0][:1],)], context().probe)
    with pytest.raises(UsageError, match="two windows"):
        apply(graph("mamba"), "reconstruct", given)


def test_comes_behind_rewrites_and_in_front_of_calibration() -> None:
    plan = [p.name for p in make_plan(parse_passes("hadamard,reconstruct,percentile,quantise"))]
    places = [plan.index(n) for n in ("hadamard", "reconstruct", "percentile", "quantise")]
    assert places == sorted(places)
    with pytest.raises(UsageError, match="must run before"):
        make_plan(parse_passes("reconstruct,hadamard"))


def test_what_it_costs_is_told_against_the_model_before_it() -> None:
    def change(self: Pass, g: Graph, context: Context) -> None:
        for norm in g.calls("ssmc::rms_norm"):
            weight = operands(norm)["weight"]
            g.set_param(weight, 1.1 * g.param(weight))

    make_pass("louder", change, stage="reconstruct", exact_to=None)
    model = build("mamba")
    compiled = ssmc.compile(model, passes="louder", scheme="none", calibration=tokens(4, 33))
    assert compiled.about["metrics"]["probe_signal_to_noise_db"] < 60


# -- a trained model --------------------------------------------------------------------------


def demo_windows(model: ssmc.frontend.Model, file: Any, count: int, length: int) -> Tensor:
    assert model.tokenizer is not None
    assert model.eos_token_id is not None
    texts = read_texts(file)
    return token_windows(model.tokenizer, texts, model.eos_token_id, length, "demo")[:count]


@pytest.mark.parametrize("kind", KINDS)
def test_goes_with_rotations_and_other_schemes(kind: str) -> None:
    passes = f"hadamard,reconstruct{{{COARSE}}},percentile,quantise,state{{bits=4,scales=tensor}}"
    records = apply(graph(kind), passes)
    # What was trained is in the ranges: calibration comes behind it.
    assert list(records).index("reconstruct") < list(records).index("percentile")
    done = records["reconstruct"]
    assert len(done.matched) + len(done.skipped) == 2


@pytest.mark.slow
def test_a_trained_model_loses_less_on_other_text() -> None:
    model = ssmc.load_model("demo")
    plain = ssmc.trace(model.module)
    ids = demo_windows(model, evaluation_file(), 4, 64)
    given = Context([(demo_windows(model, calibration_file(), 24, 64),)])
    errors, expected, graphs = [], plain(ids)[0], []
    for passes in ("state{bits=4}", "reconstruct{length=64,steps=24},state{bits=4}"):
        g, states, logits = plain.copy(), None, []
        records = apply(g, f"fold-a-log,{passes}", given)
        for token in ids.split(1, 1):
            result, states = g(token, states=states)
            logits.append(result)
        errors.append(error(torch.cat(logits, 1), expected))
        graphs.append(g.params())
    assert errors[1] < 0.97 * errors[0], errors
    assert len(records["reconstruct"].matched) > 4
    changed = {n for n, value in graphs[1].items() if not torch.equal(value, graphs[0][n])}
    kinds = {name.partition("layers.")[2].partition(".")[2] for name in changed}
    projections = {"mixer.x_proj.weight", "mixer.dt_proj.weight", "mixer.dt_proj.bias"}
    convolution = {"mixer.conv1d.weight", "mixer.conv1d.bias"}
    assert kinds == projections | convolution | {"norm.weight"}
