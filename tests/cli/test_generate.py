"""`ssmc generate`: shown as it comes, several prompts from a file, what ends a text."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from ssmc.cli import output

from .conftest import Call

PROMPTS = ["w3 w5 w7", "w11", "w2 w4 w6 w8 w10 w12", "w9 w1", "w11"]
WARM = ("--temperature", 2, "--top-p", 0.95, "--min-p", 0.01, "--repetition-penalty", 1.1)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": prompt, "id": f"n{i}"} for i, prompt in enumerate(PROMPTS)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def alone(call: Call, target: Path, prompt: str, *more: Any) -> dict[str, Any]:
    data = call("generate", target, "--prompt", prompt, "-n", 9, *more, "--json").json
    return {key: data[key] for key in ("prompt", "text", "tokens", "ended", "seed")}


@pytest.mark.parametrize("which", ["model", "artefact"])
@pytest.mark.parametrize("more", [(), WARM], ids=["greedy", "drawn"])
def test_prompts_of_a_file_are_what_they_are_alone(
    call: Call, tiny_folder: Path, tiny_artefact: Path, file: Path, which: str, more: Any
) -> None:
    target = tiny_folder if which == "model" else tiny_artefact
    several = ("generate", target, "--prompts", file, "--batch", 3, "-n", 9, "--seed", 5, *more)
    lines = call(*several, "--jsonl").out.splitlines()
    results = [json.loads(line) for line in lines]
    assert [row.pop("schema") for row in results] == [1] * 5
    assert call(*several, "--json").json["results"] == results
    expected = [
        {"id": f"n{i}"} | alone(call, target, prompt, *more, "--seed", 5 + i)
        for i, prompt in enumerate(PROMPTS)
    ]
    assert results == expected
    assert (results[1]["tokens"] == results[4]["tokens"]) == (not more)


def test_text_of_several(call: Call, tiny_artefact: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS[:2]) + "\n\n")
    ended = call("generate", tiny_artefact, "--prompts", path, "-n", 4)
    texts = [alone(call, tiny_artefact, p, "-n", 4)["text"] for p in PROMPTS[:2]]
    assert ended.out == "".join(f"{p}{t}\n\n" for p, t in zip(PROMPTS, texts, strict=False))
    assert "tokens in" in ended.err


def test_a_prompt_on_a_line(call: Call, tiny_artefact: Path) -> None:
    ended = call("generate", tiny_artefact, "--prompt", "w3", "-n", 9, "--jsonl")
    assert json.loads(ended.out) == {"schema": 1} | alone(call, tiny_artefact, "w3")


def test_it_is_shown_as_it_comes(
    call: Call, tiny_artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[str] = []
    monkeypatch.setattr(output, "say_part", pieces.append)
    call("generate", tiny_artefact, "--prompt", "w3 w5", "-n", 4)
    data = alone(call, tiny_artefact, "w3 w5", "-n", 4)
    assert pieces[0] == "w3 w5"
    assert "".join(pieces[1:]) == data["text"]
    assert [p for p in pieces[1:] if p] == [f" {word}" for word in data["text"].split()]


def test_stop_strings_are_not_shown(call: Call, tiny_artefact: Path) -> None:
    whole = alone(call, tiny_artefact, "w3")
    words = whole["text"].split()
    stop = f"{words[2][-1]} {words[3][:2]}"  # the end of a word, a space, the beginning of the next
    data = alone(call, tiny_artefact, "w3", "--stop", "never", "--stop", stop)
    assert data["text"] == whole["text"][: whole["text"].index(stop)]
    assert data["ended"] == "stop"
    assert data["tokens"] == whole["tokens"][: len(data["tokens"])]
    ended = call("generate", tiny_artefact, "--prompt", "w3", "-n", 9, "--stop", stop)
    assert ended.out == f"w3{data['text']}\n"


def test_what_ended_it(call: Call, tiny_artefact: Path) -> None:
    assert alone(call, tiny_artefact, "w3")["ended"] == "length"
    special = alone(call, tiny_artefact, "w3", "--max-new-tokens", 3)
    assert (special["ended"], len(special["tokens"])) == ("length", 3)


def test_ctrl_c_leaves_what_was_printed(
    call: Call, tiny_artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = output.say_part
    count = iter(range(100))

    def interrupted(text: str) -> None:
        said(text)
        if next(count) == 3:
            signal.raise_signal(signal.SIGINT)

    whole = alone(call, tiny_artefact, "w3")["text"].split()
    monkeypatch.setattr(output, "say_part", interrupted)
    ended = call("generate", tiny_artefact, "--prompt", "w3", "-n", 9)
    assert ended.code == 130
    assert ended.out == f"w3 {' '.join(whole[:3])}\n"
    assert "interrupted" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "w1", "--prompts", "FILE"], "two kinds of prompts"),
        (["--prompts", "nowhere.txt"], "cannot read nowhere.txt"),
        (["--prompts", "FILE"], "prompt 2 of FILE is empty"),
        (["--prompt", "w1", "--json", "--jsonl"], "either --json or --jsonl"),
    ],
)
def test_refuses(
    call: Call, tiny_artefact: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "w1"}\n{"prompt": ""}\n')
    ended = call("generate", tiny_artefact, *(a.replace("FILE", str(path)) for a in arguments))
    assert ended.code == 2
    assert message.replace("FILE", str(path)) in ended.error
    assert ended.out == ""
