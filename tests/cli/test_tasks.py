"""`ssmc eval --tasks`, and `lm_eval --model ssmc`."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import COMMAND, ended, start

from ssmc.cli.target import open_target
from ssmc.cli.tasks import find_baseline
from ssmc.core.ranks import Ranks

from .conftest import Call, legible

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: make test-eval"
)

CLOZE = """\
task: own_cloze
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
  cache_dir: {cache}
output_type: multiple_choice
test_split: test
doc_to_text: ctx
doc_to_choice: endings
doc_to_target: label
metric_list: [{{metric: acc}}]
"""
LAST_WORD = """\
task: own_last_word
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
  cache_dir: {cache}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{text.rpartition(' ')[0]}}}}"
doc_to_target: "{{{{' ' + text.rpartition(' ')[2]}}}}"
metric_list: [{{metric: acc}}, {{metric: perplexity}}]
"""


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No task of a test may need the network."""
    if importlib.util.find_spec("datasets") is not None:
        import datasets

        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_without_lm_eval_it_says_what_installs_it(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    ended = call("eval", "demo", "--tasks", "embedded")
    assert ended.code == 2
    assert "lm-eval, which is not installed" in ended.error
    assert "pip install 'ssmc[eval]'" in ended.error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "embedded", "--by-length"], "--tasks have texts of their own"),
        (["--tasks", "embedded", "--mode", "recurrent"], "--tasks have texts of their own"),
        (["--baseline", "demo"], "go with --tasks"),
        (["--include", "."], "go with --tasks"),
    ],
)
def test_options_that_do_not_go_together(call: Call, arguments: list[str], message: str) -> None:
    ended = call("eval", "demo", *arguments)
    assert ended.code == 2
    assert message in ended.error


@needs_lm_eval
def test_a_model_scores(call: Call, offline: None) -> None:
    lines = legible(call("eval", "demo", "--tasks", "embedded", "--limit", 2, "--device", "cpu"))
    assert lines[0].split() == ["task", "metric", "better", "value", "±"]
    named = [line.split()[:3] for line in lines[1:]]
    assert ["embedded_cloze", "acc", "higher"] in named
    assert ["embedded_last_word", "perplexity", "lower"] in named
    assert ["embedded_pages", "word_perplexity", "lower"] in named


@needs_lm_eval
@pytest.mark.parametrize("execution", ["lowered", "simulated"])
def test_an_artefact_scores_beside_the_model_it_was_made_from(
    call: Call, offline: None, demo_folder: Path, execution: str
) -> None:
    found = call(
        "eval", demo_folder, "--tasks", "embedded_last_word, embedded_cloze", "--limit", 3,
        "--execution", execution, "--device", "cpu", "--json",
    ).json  # fmt: skip
    assert found["baseline"] == "demo"
    assert found["limit"] == 3
    by_name = {(row["task"], row["metric"]): row for row in found["scores"]}
    perplexity = by_name["embedded_last_word", "perplexity"]
    assert perplexity["documents"] == 3
    assert perplexity["higher_is_better"] is False
    assert perplexity["difference"] == pytest.approx(perplexity["value"] - perplexity["baseline"])
    assert 0 < abs(perplexity["difference"]) < 0.2 * perplexity["baseline"]
    accuracy = by_name["embedded_cloze", "acc"]
    assert accuracy["value"] in (0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1)
    assert accuracy["error"] is not None


@needs_lm_eval
def test_processes_say_once_what_one_says(
    demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = ("eval", str(demo_folder), "--tasks", "embedded", "--limit", "2", "--json")
    alone, first, second = ended([*start(1, COMMAND, *command), *start(2, COMMAND, *command)])
    found = [json.loads(out) | {"seconds": 0} for out in (alone, first)]
    assert found[0] == found[1]
    assert found[0]["baseline"] == "demo"
    assert second == ""


@needs_lm_eval
def test_a_baseline_by_name_or_none(call: Call, offline: None, demo_folder: Path) -> None:
    arguments = ("eval", demo_folder, "--tasks", "embedded_cloze", "--limit", 1, "--baseline")
    alone = call(*arguments, "none", "--json").json
    assert alone["baseline"] is None
    assert {row["difference"] for row in alone["scores"]} == {None}
    itself = call(*arguments, demo_folder, "--json").json
    assert {row["difference"] for row in itself["scores"]} == {0}
    lines = legible(call(*arguments, "demo"))
    assert lines[0].split() == [
        "task", "metric", "better", "value", "±", "demo", "difference", "±",
    ]  # fmt: skip


def test_the_float_model_has_to_be_the_one(
    capsys: pytest.CaptureFixture[str],
    tiny_folder: Path,
    tiny_artefact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = open_target(str(tiny_artefact), device="cpu")
    monkeypatch.chdir(tmp_path)
    assert find_baseline(target, None, "cpu", Ranks()) is None
    assert "tiny-mamba, which it was made from, is not here" in capsys.readouterr().err
    monkeypatch.chdir(tiny_folder.parent)
    found = find_baseline(target, None, "cpu", Ranks())
    assert found is not None
    assert found.name == "tiny-mamba"
    other = shutil.copytree(tiny_folder, tmp_path / "tiny-mamba")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    monkeypatch.chdir(tmp_path)
    assert find_baseline(target, None, "cpu", Ranks()) is None
    assert find_baseline(found, None, "cpu", Ranks()) is None


@needs_lm_eval
def test_tasks_of_ones_own(
    call: Call, offline: None, shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    for name, text, file in (
        ("cloze", CLOZE, "tasks/cloze.jsonl"),
        ("last_word", LAST_WORD, "tasks/lambada_test.jsonl"),
    ):
        written = text.format(file=shared_data(file), cache=tmp_path / "cache")
        (tmp_path / f"{name}.yaml").write_text(written)
    found = call(
        "eval", "demo", "--tasks", "own_cloze,own_last_word", "--include", tmp_path,
        "--limit", 2, "--device", "cpu", "--json",
    ).json  # fmt: skip
    assert {row["task"] for row in found["scores"]} == {"own_cloze", "own_last_word"}


@needs_lm_eval
def test_solved_examples_stand_before_the_question(
    call: Call,
    offline: None,
    shared_data: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ssmc.evaluate.harness import HarnessModel

    seen: list[str] = []
    scored = HarnessModel.loglikelihood

    def noted(self: HarnessModel, requests: list[Any], disable_tqdm: bool = True) -> Any:
        seen.extend(request.args[0] for request in requests)
        return scored(self, requests, disable_tqdm)

    monkeypatch.setattr(HarnessModel, "loglikelihood", noted)
    text = CLOZE.format(file=shared_data("tasks/cloze.jsonl"), cache=tmp_path / "cache")
    (tmp_path / "own.yaml").write_text(f"{text}\nfewshot_split: test\n")
    arguments = (
        "eval", "demo", "--tasks", "own_cloze", "--include", tmp_path, "--limit", 2,
        "--device", "cpu", "--json",
    )  # fmt: skip
    assert call(*arguments).json["num_fewshot"] is None
    alone, seen = seen[:], []
    assert call(*arguments, "--num-fewshot", 2).json["num_fewshot"] == 2
    assert len(seen) == len(alone)
    for without, with_examples in zip(alone, seen, strict=True):
        assert with_examples.endswith(without)
        assert with_examples.count("\n\n") >= 2


@needs_lm_eval
def test_what_a_task_draws_is_the_same_every_time(
    call: Call, offline: None, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "{i} {i * i}"}}\n' for i in range(99)))
    text = LAST_WORD.format(file=tmp_path / "rows.jsonl", cache=tmp_path / "cache")
    (tmp_path / "own.yaml").write_text(f"{text}process_docs: !function drawn.documents\n")
    (tmp_path / "drawn.py").write_text(
        "import random\n\ndef documents(rows):\n"
        "    return rows.select(random.sample(range(len(rows)), 3))\n"
    )
    values = []
    for seed in (1, 2):
        random.seed(seed)
        found = call(
            "eval", "demo", "--tasks", "own_last_word", "--include", tmp_path,
            "--baseline", "demo", "--device", "cpu", "--json",
        ).json  # fmt: skip
        assert {row["difference"] for row in found["scores"]} == {0}
        values.append([row["value"] for row in found["scores"]])
    assert values[0] == values[1]


@needs_lm_eval
def test_an_unknown_task(call: Call) -> None:
    ended = call("eval", "demo", "--tasks", "embedded_cloze,lambada_opnai")
    assert ended.code == 2
    assert "no task 'lambada_opnai'" in ended.error
    assert "lambada_openai" in ended.error.splitlines()[1]
    assert "loading" not in ended.err


@needs_lm_eval
def test_data_that_is_not_here(call: Call, offline: None, tmp_path: Path) -> None:
    text = CLOZE.format(file="missing.jsonl", cache=tmp_path)
    (tmp_path / "own.yaml").write_text(text)
    ended = call("eval", "demo", "--tasks", "own_cloze", "--include", tmp_path)
    assert ended.code == 2
    assert "the data of task 'own_cloze' cannot be loaded" in ended.error
    assert "no folder" in call("eval", "demo", "--tasks", "x", "--include", "nowhere").error


@needs_lm_eval
@pytest.mark.slow
def test_lm_evals_own_command_line(
    shared_data: Callable[[str], Path], demo_folder: Path, tmp_path: Path
) -> None:
    file = shared_data("tasks/cloze.jsonl")
    (tmp_path / "own.yaml").write_text(CLOZE.format(file=file, cache=tmp_path))
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "--model", "ssmc", "--tasks", "own_cloze",
         "--model_args", f"target={demo_folder},execution=simulated",
         "--include_path", str(tmp_path), "--limit", "2", "--batch_size", "4"],
        capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "|own_cloze|" in done.stdout
