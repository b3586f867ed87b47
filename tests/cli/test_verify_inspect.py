"""`ssmc verify` and `ssmc inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ssmc
from ssmc import ops
from ssmc.lowering.backends import cpu

from .conftest import Call, legible


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_verify(call: Call, tiny_folder: Path, tiny_artefact: Path, backend: str) -> None:
    arguments = ("verify", tiny_artefact, "--text", tiny_folder / "text.txt", "--length", 24)
    lines = legible(call(*arguments, "--backend", backend))
    assert lines[0].split() == ["operator", "calls", "values", "differing", "worst", "error"]
    assert [line.split()[3] for line in lines[1:-2]] == ["0"] * (len(lines) - 3)
    compared = sum(int(line.split()[1]) for line in lines[1:-2])
    used = "cpu" if backend == "auto" else backend
    assert lines[-1] == f"{compared} of {compared} calls agree, {used} against the simulation"
    data = call(*arguments, "--backend", backend, "--json").json
    assert data["agrees"] is True
    assert all(c["operator"].startswith("ssmc::") for c in data["comparisons"])


def test_verify_names_a_broken_kernel(
    call: Call, tiny_folder: Path, tiny_artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        u_q, state = ops.int8_causal_conv1d_quantize(*args)
        return u_q, state.roll(1, -1)

    operator = "ssmc::int8_causal_conv1d_quantize"
    monkeypatch.setitem(cpu.CPU.load(), operator, wrong)  # type: ignore[arg-type]
    arguments = ("verify", tiny_artefact, "--text", tiny_folder / "text.txt", "--length", 24)
    ended = call(*arguments)
    assert ended.code == 1
    assert f"({operator}) differs" in ended.error
    assert "6 of" in ended.error
    assert call(*arguments, "--backend", "reference").code == 0
    ended = call(*arguments, "--json")
    assert ended.code == 1
    assert ended.json["agrees"] is False


def test_verify_wants_an_artefact(call: Call, tiny_folder: Path, tiny_artefact: Path) -> None:
    for target in (tiny_folder, "demo", "nowhere"):
        ended = call("verify", target)
        assert ended.code == 2
        assert "is no artefact" in ended.error
    ended = call("verify", tiny_artefact, "--backend", "cpuu")
    assert ended.code == 2
    assert "did you mean cpu?" in ended.error


@pytest.mark.parametrize("command", ["verify", "inspect", "eval", "generate"])
def test_a_damaged_artefact_is_named_by_every_command(
    call: Call, spoilt: Path, command: str
) -> None:
    raw = bytearray((spoilt / "model.safetensors").read_bytes())
    raw[-5] ^= 1
    (spoilt / "model.safetensors").write_bytes(raw)
    more = ["--prompt", "w1"] if command == "generate" else []
    ended = call(command, spoilt, *more)
    assert ended.code == 2
    assert "model.safetensors was altered" in ended.error
    (spoilt / "ssmc.json").unlink()
    ended = call(command, spoilt, *more)
    assert ended.code == 2


def test_inspect_shows_the_graph(call: Call, tiny_folder: Path, tiny_artefact: Path) -> None:
    ended = call("inspect", tiny_artefact)
    assert ended.code == 0
    assert "ssmc::dequantize" in ended.out
    assert set(call("inspect", tiny_artefact, "--json").json["nodes"].values()) == set(
        ended.out.splitlines()
    )
    model = call("inspect", tiny_folder)
    assert "ssmc::selective_scan" in model.out
    assert "quantize" not in model.out


def test_inspect_one_layer(call: Call, tiny_artefact: Path) -> None:
    whole = call("inspect", tiny_artefact).out.splitlines()
    one = call("inspect", tiny_artefact, "--layer", 1).out.splitlines()
    assert one
    assert all(line.startswith("%backbone_layers_1_") for line in one if "getitem" not in line)
    assert len(one) < len(whole) / 2
    for more in ([], ["--params"], ["--numerics"]):
        ended = call("inspect", tiny_artefact, "--layer", 3, *more)
        assert ended.code == 2
        assert "has no layer 3\n  its layers: 0 to 2" in ended.error


@pytest.mark.parametrize("view", ["--diff", "--params", "--numerics"])
@pytest.mark.parametrize("more", [[], ["--layer", "0"]])
def test_inspect_views_of_an_artefact(
    call: Call, tiny_artefact: Path, view: str, more: list[str]
) -> None:
    ended = call("inspect", tiny_artefact, view, *more)
    assert ended.code == 0
    if view != "--diff":
        legible(ended)
    assert ended.err == ""
    call("inspect", tiny_artefact, view, *more, "--json").json.pop("target")


def test_inspect_numerics_has_the_worst_block_first(call: Call, tiny_artefact: Path) -> None:
    lines = legible(call("inspect", tiny_artefact, "--numerics"))
    assert lines[1].split()[:2] == ["block", "output"]
    lines = lines[: lines.index("")] if "" in lines else lines
    outputs = [float(line.split()[1]) for line in lines[2:]]
    assert outputs == sorted(outputs)
    assert len(outputs) == 3
    blocks = call("inspect", tiny_artefact, "--numerics", "--json").json["blocks"]
    assert [b["output"] for b in blocks] == pytest.approx(outputs, abs=0.051)
    (one,) = call("inspect", tiny_artefact, "--numerics", "--layer", 1, "--json").json["blocks"]
    assert one["block"] == 1


def test_inspect_numerics_has_the_worst_operator_first(call: Call, tiny_artefact: Path) -> None:
    data = call("inspect", tiny_artefact, "--numerics", "--json").json["operators"]
    names = [row["operator"] for row in data]
    expected = {f"layer.{i}.{role}" for i in range(3) for role in
                ("in_proj", "conv1d", "x_proj", "dt_proj", "scan", "out_proj")}  # fmt: skip
    assert set(names) == expected | {"embedding", "head"}
    assert [row["own"] for row in data] == sorted(row["own"] for row in data)
    printed = legible(call("inspect", tiny_artefact, "--numerics"))
    assert [line.split()[0] for line in printed[-len(names) :]] == names
    one = call("inspect", tiny_artefact, "--numerics", "--layer", 1, "--json").json["operators"]
    assert {row["operator"] for row in one} == {n for n in names if n.startswith("layer.1.")}


def test_inspect_params_are_those_of_the_tensors(call: Call, tiny_artefact: Path) -> None:
    stats = call("inspect", tiny_artefact, "--params", "--json").json["params"]
    params = ssmc.load(tiny_artefact).graph.params()
    assert stats.keys() == params.keys()
    for name, tensor in params.items():
        assert stats[name]["shape"] == list(tensor.shape)
        assert stats[name]["absmax"] == tensor.double().abs().max().item()


def test_inspect_diff_of_a_pass(call: Call, tiny_artefact: Path) -> None:
    ended = call("inspect", tiny_artefact, "--diff", "--after", "hadamard")
    assert ended.out.startswith("hadamard   3 matched, 0 skipped")
    added = [line for line in ended.out.splitlines() if line.startswith("+ ")]
    assert sum("ssmc::hadamard(" in line for line in added) == 3
    (record,) = call("inspect", tiny_artefact, "--diff", "--after", "hadamard", "--json").json[
        "passes"
    ]
    assert record["name"] == "hadamard"


def test_inspect_a_model_after_a_pass(call: Call, tiny_folder: Path) -> None:
    before = call("inspect", tiny_folder, "--samples", 1).out
    assert "ssmc::hadamard" not in before
    text = ["--samples", 1]
    after = call("inspect", tiny_folder, "--after", "hadamard", *text).out
    assert "ssmc::hadamard" in after
    assert "quantize" not in after
    numerics = legible(call("inspect", tiny_folder, "--numerics", *text))
    assert len(numerics) == 2 + 3 + 1 + 2 + 3 * 6 + 2
    ended = call("inspect", tiny_folder, "--diff", "--after", "fold-norm", *text)
    assert ended.out.startswith("fold-norm   ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--after", "hadamrd"], "did you mean hadamard?"),
        (["--after", "smooth"], "was made without pass 'smooth'"),
        (["--after", "hadamard"], "holds the graph after its last pass, quantise"),
        (["--after", "hadamard", "--params"], "holds the graph after its last pass, quantise"),
        (["--diff", "--numerics"], "are different views"),
        (["--layer", "-1"], "'--layer'"),
    ],
)
def test_inspect_refuses(
    call: Call, tiny_artefact: Path, arguments: list[str], message: str
) -> None:
    ended = call("inspect", tiny_artefact, *arguments)
    assert ended.code == 2
    assert message in ended.error
    assert ended.error.count("\n") == 1


def test_a_layer_as_a_graph(call: Call, tiny_artefact: Path) -> None:
    lines = legible(call("inspect", tiny_artefact, "--graph", "--layer", 1))
    assert lines[0] == "layer 1 of 3"
    assert any("● linear in_proj" in line for line in lines)
    assert lines[-1].strip().startswith("╰─● add")
    data = call("inspect", tiny_artefact, "--graph", "--json").json
    assert data["layer"] == 0
    assert "in_proj" in {c["role"] for c in data["calls"]}
    ended = call("inspect", tiny_artefact, "--graph", "--layer", 7)
    assert ended.code == 2
    assert "has no layer 7" in ended.error


def test_a_layer_as_a_graph_with_what_a_pass_changed(call: Call, tiny_folder: Path) -> None:
    asked = ("inspect", tiny_folder, "--graph", "--samples", 1, "--after")
    lines = legible(call(*asked, "hadamard", "--layer", 1))
    assert lines[0] == "layer 1 of 3 after hadamard: + new, ~ changed"
    found = [(line[0], *line.partition("● ")[2].split()[:2]) for line in lines[2:]]
    marked = {m for m in found if m[0] != " "}
    assert {m[:2] for m in marked if m[0] == "+"} == {("+", "hadamard")}
    assert {m for m in marked if m[0] == "~"} == {("~", "linear", "out_proj")}
    lines = legible(call(*asked, "fold-norm"))
    assert any(line.startswith("- rms_norm norm ") for line in lines)
    calls = call(*asked, "fold-norm", "--json").json["calls"]
    assert {c["mark"] for c in calls if c["role"] == "in_proj"} == {"~"}


def test_a_report_of_a_model_and_of_what_was_made_from_it(
    call: Call, tiny_folder: Path, tiny_artefact: Path, tmp_path: Path
) -> None:
    page, plots = tmp_path / "report.html", tmp_path / "plots"
    of_artefact = call(
        "inspect", tiny_artefact, "--model", tiny_folder, "--html", page, "--plot", plots
    )
    lines = legible(of_artefact)
    count = len(list(plots.iterdir()))
    assert [line.split(maxsplit=1) for line in lines] == [
        ["wrote", f"{plots}: {count} plots"],
        ["wrote", str(page)],
    ]
    assert page.read_text(encoding="utf-8").count("<h3>hadamard</h3>") == 1
    assert (plots / "errors.png").is_file()
    ended = call("inspect", tiny_artefact, "--html", page, "--layer", 9)
    assert ended.code == 2
    assert "has no layer 9" in ended.err


def test_a_report_without_the_model(
    call: Call, tiny_artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = call("inspect", tiny_artefact, "--html", "report.html")
    assert ended.code == 0
    assert "--model says where it is" in ended.err
    assert "is not here" in Path("report.html").read_text(encoding="utf-8")
    data = call("inspect", tiny_artefact, "--html", "report.html", "--json").json
    assert data["written"] == ["report.html"]
    other = call("inspect", tiny_artefact, "--html", "report.html", "--model", "demo")
    assert "is another than that it was made from" in other.err


def test_views_are_chosen_one_at_a_time(call: Call, tiny_artefact: Path) -> None:
    ended = call("inspect", tiny_artefact, "--graph", "--diff")
    assert ended.code == 2
    assert "--diff and --graph are different views" in ended.error
