"""The example scripts: they run, and what they print is so."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import ssmc
from ssmc.lowering import lower

from .conftest import EXAMPLES

Example = Callable[[str], ModuleType]


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    environment = os.environ | {"NO_COLOR": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize("passes", ["hadamard,percentile", "hadamard{residual=true},percentile"])
def test_word_breaks_keeps_its_accuracy(example: Example, tmp_path: Path, passes: str) -> None:
    result = example("word_breaks").compare(passes, count=64)
    assert result.float_accuracy > 0.93  # 0.78 without a break
    assert abs(result.int8_accuracy / result.float_accuracy - 1) < 0.005
    assert not torch.equal(result.int8_scores, result.float_scores)
    assert result.compiled.lowered.kept == []
    plain = lower(result.compiled.graph, "reference")  # other back ends fuse some of these
    # Embedding, head, and of two layers: in_proj, conv, out_proj, and two scans with projections.
    assert len(plain.fused) == 2 + 2 * (3 + 2 * 3)
    letters = result.letters[:3, :21]
    again = ssmc.load(result.compiled.save(tmp_path / "out"))
    assert torch.equal(again(letters)[0], result.compiled(letters)[0])


def test_word_breaks_prints_what_it_measures(
    example: Example, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    word_breaks = example("word_breaks")
    result = word_breaks.compare(count=8)
    monkeypatch.setattr(word_breaks, "compare", lambda: result)
    word_breaks.main()
    out = capsys.readouterr().out
    assert f"int8 {result.int8_accuracy:.4f}" in out
    text = out.splitlines()[0]
    read = "".join(letter for letter in text if letter.isalpha())
    spoken = "".join(word_breaks.LETTERS[i] for i in result.letters[0].tolist())
    assert spoken.startswith(read)
    assert text.count(" ") > 20


SMALL = ("--samples", "2", "--windows", "2", "--length", "65", "--markdown", "--only")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def table(text: str) -> list[str]:
    """The lines of the only table."""
    return [line for line in text.splitlines() if line.startswith("|")]


def test_reproduce_prints_what_it_measures(tmp_path: Path) -> None:
    row = "hadamard,absmax,quantise{embedding=false,head=false}"
    passages = tmp_path / "passages.jsonl"
    passages.write_text('{"text": "In the beginning"}\n{"text": "the United States of America"}\n')
    asked = ("--also", row, "--also", "naive", "--last-word", str(passages))
    ran = script("reproduce.py", *asked, *SMALL)
    assert ran.returncode == 0, ran.stderr
    heads, _, *lines = table(ran.stdout)
    columns = ["perplexity", "loss %", "MB", "last word %"]
    assert cells(heads) == ["method", *(f"demo {column}" for column in columns)]
    (name, reference, _, size, _), *rows = map(cells, lines)
    assert name == "float32"
    assert float(size) == pytest.approx(22.4, abs=0.05)
    assert [cell[0] for cell in rows] == [row, "naive"]
    for _, perplexity, loss, _, words in rows:
        assert float(loss) == pytest.approx(
            100 * (float(perplexity) / float(reference) - 1), abs=0.02
        )
        assert float(words) in (0, 50, 100)
    assert abs(float(rows[0][2])) < 5
    assert 0.6 < float(rows[0][3]) / 11.2 < 0.75
    *_, overlap, last = ran.stdout.splitlines()
    assert re.fullmatch(r"demo: 0\.0% of the text is in the calibration text", overlap)
    assert re.match(r"\d{4}-\d\d-\d\d, ssmc .*, torch .*: python .*reproduce.py --also", last)


def test_reproduce_rounds_states_token_by_token(tmp_path: Path) -> None:
    rows = ("state{bits=8}", "state{bits=4,scales=tensor}")
    asked = (part for row in rows for part in ("--also-states", row))
    ran = script("reproduce.py", *asked, *SMALL, "--recurrent", "1")
    assert ran.returncode == 0, ran.stderr
    heads, _, exact, *rounded = map(cells, table(ran.stdout))
    assert heads == ["method", "demo perplexity", "demo loss %", "demo kB"]
    assert [row[0] for row in rounded] == list(rows)
    losses = [abs(float(row[2])) for row in rounded]
    assert losses[0] < losses[1]
    sizes = [float(row[3]) for row in (exact, *rounded)]
    assert sizes == sorted(sizes, reverse=True)


def test_reproduce_leaves_out_what_is_not_supported(tiny_folder: Path, tmp_path: Path) -> None:
    unknown = Path(shutil.copytree(tiny_folder, tmp_path / "unknown"))
    config = json.loads((unknown / "config.json").read_text())
    config |= {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 1,
               "n_head": 1, "n_embd": 8}  # fmt: skip
    (unknown / "config.json").write_text(json.dumps(config))
    text = str(tiny_folder / "text.txt")
    given = ("--text", text, "--calibration", text, *SMALL, "--also", "naive")
    ran = script("reproduce.py", "--models", str(unknown), "--models", str(tiny_folder), *given)
    assert ran.returncode == 0, ran.stderr
    assert f"{unknown} is left out: " in ran.stderr
    assert [head.split()[0] for head in cells(table(ran.stdout)[0])[1:]] == [tiny_folder.name] * 3
    ran = script("reproduce.py", "--models", str(unknown), *given)
    assert ran.returncode == 3


def test_reproduce_has_no_figures_where_a_row_cannot_be_done(tiny_folder: Path) -> None:
    text = str(tiny_folder / "text.txt")
    given = ("--models", str(tiny_folder), "--text", text, "--calibration", text, *SMALL)
    ran = script("reproduce.py", *given, "--also", "hadamard{block=7}", "--also", "naive")
    assert ran.returncode == 0, ran.stderr
    assert cells(table(ran.stdout)[-2]) == ["hadamard{block=7}", "-", "-", "-"]
    assert "hadamard{block=7}: " in ran.stderr


def test_reproduce_puts_models_side_by_side(tiny_folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_folder, tmp_path / "other"))
    models = ("--models", str(tiny_folder), "--models", str(other))
    text = str(tiny_folder / "text.txt")
    ran = script("reproduce.py", *models, "--text", text, "--calibration", text, *SMALL)
    assert ran.returncode == 0, ran.stderr
    heads, _, line = map(cells, table(ran.stdout))
    assert [head.split()[0] for head in heads[1:]] == [tiny_folder.name] * 3 + ["other"] * 3
    assert line[1:4] == line[4:]


def test_reproduce_says_what_is_wrong_before_it_runs() -> None:
    ran = script("reproduce.py", "--only", "--also", "hadamard{blok=4}")
    assert ran.returncode == 2
    assert "did you mean block?" in ran.stderr
    assert ran.stdout == ""


def test_reproduce_has_every_recipe_and_all_rows_can_be_planned(example: Example) -> None:
    from ssmc.catalogue import builtin_recipes

    reproduce = example("reproduce")
    assert set(builtin_recipes()) <= set(reproduce.ROWS.values())
    for recipe in reproduce.planned(reproduce.ROWS | reproduce.STATES, samples=3).values():
        assert recipe.samples == 3
        assert recipe.plan()[-1].stage == "quantise"
