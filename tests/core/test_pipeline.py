"""The pipeline: the checks around a pass, its record, and what is left when it fails."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssmc import ops
from ssmc.core import Context, Graph, Pass, Record, diff, make_plan, pipeline, run_passes
from ssmc.core.diff import Snapshot, param_stats, tensor_hash
from ssmc.core.legality import check_tensors
from ssmc.core.options import parse_passes
from ssmc.core.pipeline import relative_error, signal_to_noise
from ssmc.errors import NumericsError, PassError, UnsupportedError, UsageError
from ssmc.frontend import trace

from .tiny import apply, error, graph, make_pass, toy, toy_context


def _scale(by: float) -> Any:
    """The run of a pass that multiplies the toy's last weight and bias."""

    def run(self: Pass, g: Graph, context: Context) -> None:
        for node in g.calls("ssmc::linear")[-1].all_input_nodes:
            if node.op == "get_attr":
                g.match(g.set_param(node, g.param(node) * by))

    return run


def test_pass_that_changes_the_result_is_refused() -> None:
    make_pass("spoil", _scale(1.01), exact_to=1e-5)
    _, g = toy()
    context, twin = toy_context(), g.copy()
    with pytest.raises(PassError) as caught:
        apply(g, "spoil", context)
    figure = error(g(*context.probe)[0], twin(*context.probe)[0])  # type: ignore[misc]
    expected = f"pass spoil: the result on the probe changed by {figure:.1e} relative, "
    assert str(caught.value) == expected + "more than the 1e-05 it may"
    assert 1e-3 < figure < 2e-2
    assert caught.value.exit_code == 1
    assert caught.value.hint


@pytest.mark.parametrize(("by", "limit"), [(1.0, 0.0), (1.01, 0.1), (1.01, None)])
def test_pass_within_its_limit(by: float, limit: float | None) -> None:
    make_pass("touch", _scale(by), exact_to=limit)
    context, (_, g) = toy_context(), toy()
    twin = g.copy()
    record = apply(g, "touch", context)["touch"]
    expected = error(g(*context.probe)[0], twin(*context.probe)[0])  # type: ignore[misc]
    assert record.error == pytest.approx(expected, rel=1e-3)
    assert (record.error == 0) == (by == 1)
    assert record.limit == limit
    assert set(record.diff.params) == {"down.weight", "down.bias"}
    assert len(record.matched) == 2


def test_without_a_probe_nothing_is_compared() -> None:
    make_pass("spoil", _scale(2.0), exact_to=0.0)
    _, g = toy()
    assert apply(g, "spoil", Context())["spoil"].error is None


def _insert(create: Any) -> Any:
    """The run of a pass that puts what `create(graph, norm)` makes behind the toy's norm."""

    def run(self: Pass, g: Graph, context: Context) -> None:
        norm = g.calls("ssmc::rms_norm")[0]
        with g.after(norm):
            new = create(g, norm)
        norm.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    return run


def _aten(g: Graph, x: torch.fx.Node) -> torch.fx.Node:
    node = g.module.graph.call_function(torch.ops.aten.relu.default, (x,))
    node.meta["val"] = x.meta["val"]
    return node


def _quantise_early(g: Graph, x: torch.fx.Node) -> torch.fx.Node:
    return g.call("ssmc::quantize_dynamic", x, like=x)


ILLEGAL = {
    "aten": (_aten, "node 'relu_default' calls aten::relu, which is not in the dialect"),
    "method": (lambda g, x: g.module.graph.call_method("relu", (x,)), "is a call_method"),
    "module": (lambda g, x: g.module.graph.call_module("up", (x,)), "is a call_module"),
    "no value": (
        lambda g, x: g.module.graph.call_function(torch.relu, (x,)),
        "has no inferred value; create calls with Graph.call",
    ),
    "early": (_quantise_early, "quantises before the quantise stage"),
}


@pytest.mark.parametrize("case", ILLEGAL)
def test_illegal_graph_is_refused(case: str) -> None:
    create, message = ILLEGAL[case]
    make_pass("illegal", _insert(create), exact_to=None)
    _, g = toy()
    with pytest.raises(PassError, match=message) as caught:
        apply(g, "illegal", toy_context())
    assert str(caught.value).startswith("pass illegal: after a pass of stage rewrite, node '")


def test_our_errors_keep_their_type() -> None:
    make_pass("foreign", _insert(lambda g, x: g.call("aten::relu", x, like=x)))
    with pytest.raises(UnsupportedError, match="pass foreign: operator 'aten::relu' is not") as e:
        apply(toy()[1], "foreign", toy_context())
    assert e.value.exit_code == 3
    assert e.value.hint


@dataclass(frozen=True)
class Settings:
    folder: Path

    def run(self, passes: str) -> Graph:
        g = toy()[1]
        plan = make_plan(parse_passes(passes))
        run_passes(g, plan, toy_context(), crash_folder=self.folder)
        return g


def _divide(self: Any, g: Graph, context: Context) -> None:
    g.note(str(1 / 0))


LINE = _divide.__code__.co_firstlineno + 1


def test_crash_leaves_a_bundle(tmp_path: Path) -> None:
    make_pass("first", __annotations__={"size": int}, size=3)
    make_pass("divide", _divide)
    make_pass("never")
    folder = tmp_path / "deep" / "crash"
    with pytest.raises(PassError) as caught:
        Settings(folder).run("first{size=5},divide,never")
    message = f"pass divide failed: ZeroDivisionError: division by zero ({__file__}:{LINE})"
    assert str(caught.value) == message
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert str(folder) in str(caught.value.hint)
    files = {p.name: p.read_text() for p in folder.iterdir()}
    assert set(files) == {"graph.txt", "recipe.json", "traceback.txt", "rerun.txt"}
    assert "ssmc::rms_norm(%x, gamma, 1e-05)" in files["graph.txt"]
    assert json.loads(files["recipe.json"]) == {
        "passes": [{"first": {"size": 5}}, {"divide": {}}, {"never": {}}]
    }
    assert "ZeroDivisionError: division by zero" in files["traceback.txt"]
    assert f'"{__file__}", line {LINE}' in files["traceback.txt"]
    passes = files["rerun.txt"].split("'")[1]
    assert [str(p) for p in parse_passes(passes)] == ["first{size=5}", "divide"]


def test_crash_without_a_folder(tmp_path: Path) -> None:
    make_pass("divide", _divide)
    with pytest.raises(PassError) as caught:
        apply(toy()[1], "divide", toy_context())
    assert caught.value.hint is None


class Deep(Pass):
    """Fails inside torch."""

    name = "deep"
    stage = "rewrite"

    def run(self, g: Graph, context: Context) -> None:
        torch.nn.functional.interpolate(torch.zeros(2), mode="bogus", size=3)


def test_crash_deep_inside_names_the_line_of_the_pass() -> None:
    g = toy()[1]
    with pytest.raises(PassError) as caught:
        run_passes(g, [dataclass(frozen=True)(Deep)()], toy_context())
    line = Deep.run.__code__.co_firstlineno + 1
    assert str(caught.value).endswith(f"({__file__}:{line})")


def _counting(counts: list[str], name: str) -> None:
    def run(self: Pass, g: Graph, context: Context) -> None:
        counts.append(name)
        g.facts[name] = len(g.nodes)
        g.match(g.nodes[0])

    needs = () if name == "count" else ("count",)
    make_pass(name, run, stage="analyse", needs=needs)


def test_analyses_are_recomputed_after_a_change_and_kept_by_preserves() -> None:
    counts: list[str] = []
    _counting(counts, "count")
    _counting(counts, "recount")
    make_pass("first", needs=("recount",))
    make_pass("second", needs=("recount",), preserves=("count",))
    make_pass("third", needs=("recount",))
    make_pass("measure", stage="calibrate", needs=("count",), preserves=("count", "recount"))
    make_pass("fourth", stage="quantise", needs=("recount",))
    records = apply(toy()[1], "first,second,third,measure,fourth", toy_context())
    once = ["count", "recount"]
    assert counts == [*once, *once, "recount", *once]
    assert all(records[name].matched == [] for name in ("first", "second", "third", "fourth"))
    assert records["count"].matched == ["x"]


def test_a_pass_sees_the_analysis_of_the_graph_as_it_is() -> None:
    counts: list[str] = []
    _counting(counts, "count")
    seen = []

    def grow(self: Pass, g: Graph, context: Context) -> None:
        seen.append(g.facts["count"] - len(g.nodes))
        _insert(lambda g, x: g.call("relu", x, like=x))(self, g, context)

    make_pass("grow", grow, needs=("count",), exact_to=None)
    make_pass("more", grow, needs=("count",), exact_to=None)
    apply(toy()[1], "grow,more", toy_context())
    assert seen == [0, 0]


def test_facts_that_are_no_analysis_stay() -> None:
    def keep(self: Pass, g: Graph, context: Context) -> None:
        g.facts |= {"something of mine": 1, self.name: 2}

    make_pass("keep", keep)
    g = toy()[1]
    apply(g, "keep,fold-a-log", toy_context())
    assert g.facts == {"something of mine": 1, "keep": 2}


def test_hears_every_pass_in_order() -> None:
    heard: list[Any] = []
    g, plan = toy()[1], make_plan(parse_passes("fold-norm"))

    def on_pass(record: Record, graph: Graph) -> None:
        heard.append((record.name, graph is g))

    run_passes(g, plan, toy_context(), lambda p: heard.append(p.name), on_pass)
    names = ["ssm-sites", "linears", "fold-norm"]
    assert heard == [item for name in names for item in (name, (name, True))]


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_records_are_plain_data_and_repeat(kind: str) -> None:
    passes = "hadamard{residual=true},smooth,percentile{p=0.9},quantise"
    texts = []
    for _ in range(2):
        records = apply(graph(kind), passes)
        json.dumps([r.to_json() for r in records.values()], allow_nan=False)
        texts.append(json.dumps([r.to_json(timing=False) for r in records.values()]))
    assert texts[0] == texts[1]
    quantise = json.loads(texts[0])[-1]
    assert "seconds" not in quantise
    assert quantise["options"]["granularity"] == "free"
    assert quantise["diff"]["nodes_after"] > quantise["diff"]["nodes_before"]
    assert quantise["limit"] is None


def test_diff_of_nodes_and_parameters() -> None:
    _, g = toy()
    weight = g.params()["down.weight"]
    relu = _insert(lambda g, x: g.call("relu", x, like=x))

    def change(self: Pass, g: Graph, context: Context) -> None:
        relu(self, g, context)
        _scale(2.0)(self, g, context)

    make_pass("change", change, exact_to=None)
    diff = apply(g, "change", toy_context())["change"].diff
    assert [line for line in diff.added if "= relu(%rms_norm)" in line]
    assert diff.nodes_after == diff.nodes_before + 1
    before, after = diff.params["down.weight"]
    assert before is not None
    assert after is not None
    assert before.absmax == pytest.approx(weight.abs().max().item())
    assert after.absmax == pytest.approx(2 * before.absmax)
    centred = weight.double() - weight.double().mean()
    kurtosis = (centred**4).mean() / (centred**2).mean() ** 2
    assert before.kurtosis == pytest.approx(kurtosis.item())
    assert after.kurtosis == pytest.approx(before.kurtosis)
    assert (before.shape, before.dtype) == ([6, 10], "float32")
    assert before.sha256 != after.sha256
    assert "up.weight" not in diff.params


def test_statistics_do_not_depend_on_threads_and_are_computed_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    value, other = torch.randn(3, 2**17 + 5), torch.randn(7)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(param_stats(value))
    torch.set_num_threads(1)
    assert found[0] == found[1]
    hashed = []
    monkeypatch.setattr(diff, "tensor_hash", lambda x: hashed.append(x) or tensor_hash(x))
    snapshots = [Snapshot({}, {"a": x}) for x in (value, other, value)]
    changes = [diff.difference(*pair).params["a"] for pair in itertools.pairwise(snapshots)]
    assert [stats and stats.sha256 for stats in (*changes[0], *changes[1])] == [
        tensor_hash(x) for x in (value, other, other, value)
    ]
    assert changes[0][0] == found[0]
    assert len(hashed) == 2


def test_errors_of_large_values_are_found_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = torch.randn(3, 1000)
    value = reference + 1e-3 * torch.randn(3, 1000)
    expected = (value.double() - reference.double()).norm() / reference.double().norm()
    assert relative_error(value, reference) == expected.item()
    monkeypatch.setattr(pipeline, "PIECE", 7)
    assert relative_error(value, reference) == pytest.approx(expected.item(), rel=1e-12)
    assert relative_error(reference, reference) == 0


def test_large_values_are_finite_though_their_sum_overflows() -> None:
    module, _ = toy()
    module.up.weight.data[:2] = torch.finfo(torch.float32).max
    check_tensors(trace(module, torch.zeros(2, 5, 6)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_tensor_is_named_before_any_pass(bad: float) -> None:
    module, _ = toy()
    module.up.weight.data[3, 2] = bad
    g = trace(module, torch.zeros(2, 5, 6))
    with pytest.raises(NumericsError, match=r"^tensor 'up.weight' holds NaN or infinity"):
        apply(g, "fold-norm", Context())


def test_pass_that_makes_a_bad_tensor_is_named() -> None:
    make_pass("ruin", _scale(float("inf")), exact_to=None)
    with pytest.raises(NumericsError, match=r"^pass ruin: tensor 'down.weight' holds NaN"):
        apply(toy()[1], "ruin", toy_context())


class Overflow(nn.Module):
    """Finite tensors, but an exponential that overflows on large inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 6)
        self.level = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.exp(ops.rms_norm(x, None) * self.level)) + x


def test_bad_activation_is_named() -> None:
    module = Overflow()
    module.level.data += 1e3
    g = trace(module, torch.zeros(2, 5, 6))
    make_pass("idle", exact_to=None)
    with pytest.raises(NumericsError) as caught:
        apply(g, "idle", toy_context())
    assert str(caught.value) == "pass idle: node 'exp' holds NaN or infinity"


def test_bad_calibration_input_is_named() -> None:
    context = toy_context()
    context.calibration[1][0][1, 3, 2] = float("nan")
    with pytest.raises(NumericsError) as caught:
        apply(toy()[1], "absmax", context)
    assert str(caught.value) == "pass absmax: node 'x' holds NaN or infinity"


def test_usage_error_of_a_pass_keeps_its_hint() -> None:
    with pytest.raises(UsageError, match=r"^pass absmax: no calibration text") as caught:
        apply(toy()[1], "absmax", Context())
    assert "--calibration" in str(caught.value.hint)


def test_relative_error_and_signal_to_noise() -> None:
    reference = torch.tensor([3.0, -4.0])
    assert relative_error(reference * 1.1, reference) == pytest.approx(0.1, rel=1e-6)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert signal_to_noise(reference * 1.1, reference) == pytest.approx(20, rel=1e-6)
    assert signal_to_noise(reference, reference) == float("inf")
