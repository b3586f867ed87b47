"""Every command of the pages runs; one that cannot run here is parsed in full.

What they do is tested elsewhere. Here `demo` is a tiny model, and texts are short.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from ssmc import demo
from ssmc.cli.main import app, main
from ssmc.export import export

from .blocks import ROOT
from .commands import Command, commands

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "README.md"]
FOUND = [c for page in PAGES for c in commands(page) if "COMMAND" not in c.words]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]

# What makes a command quick; of an option that is given twice the last counts.
QUICK = {
    "compile": "--samples 1 --length 32 --force",
    "eval": "--limit 1 --window 64",
    "sensitivity": "--samples 1 --length 32 --limit 1",
    "inspect": "--samples 1",
    "generate": "--tokens 4",
    "chat": "--tokens 4",
    "run": "--tokens 4",
    "verify": "--length 16",
    "bench": "--iterations 2 --ttft 16 --batch 1",
    "export": "--force",
}
# By words of the command: what it takes to run it, which is not here.
NEEDS = {
    "cuda": "a GPU",
    "--random-weights": "a GPU",
    "aoti": "a C++ compiler, and its time: tests/export/test_pt2.py runs it",
    "--tasks": "lm-eval: tests/cli/test_tasks.py runs such",
    "round-a": "the package of the page installed: tests/examples runs it",
    "--install-completion": "a shell of one's own: tests/cli/test_completion.py completes",
}


def needs(command: Command) -> str | None:
    words = ",".join(command.words).split(",")
    return next((what for word, what in NEEDS.items() if word in words), None)


def of(program: str) -> list[Command]:
    """The commands of a program, each once."""
    return list({c.words: c for c in FOUND if c.program == program}.values())


@pytest.fixture(scope="module")
def place(tiny_artefact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages have made before: artefacts, and prompts."""
    folder = tmp_path_factory.mktemp("commands")
    for name in ("out", "small"):
        (folder / name).symlink_to(tiny_artefact)
    export(tiny_artefact, folder / "out-native", "native")
    (folder / "prompts.jsonl").write_text('{"prompt": "The old man"}\n{"prompt": "In the"}\n')
    return folder


def run(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """The exit code and what was written, of a command in this process."""
    monkeypatch.setattr(sys, "argv", list(words))
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n/reset\n"))
    out = io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    return int(ended.value.code or 0), out.getvalue()


def quick(command: Command) -> tuple[str, ...]:
    """The command on little text, and beside what others have written."""
    words = (*command.words, *QUICK.get(command.words[1], "").split())
    if "auto" in words:
        words += ("--evaluations", "2", "--search-windows", "1")
    renamed = {"out": "made", "small": "made-small"}
    if command.words[1] == "compile" and "-o" in words:
        at = words.index("-o") + 1
        words = (*words[:at], renamed.get(words[at], words[at]), *words[at + 1 :])
    return words


@pytest.mark.parametrize("command", [c for c in of("ssmc") if not needs(c)], ids=str)
def test_a_command_of_ssmc_runs(
    command: Command, place: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(demo, "model_folder", lambda: tiny_folder)
    code, text = run(quick(command), monkeypatch)
    assert code == 0, text


@pytest.mark.parametrize("command", [c for c in of("ssmc") if needs(c)], ids=str)
def test_a_command_that_cannot_run_here_is_one(command: Command) -> None:
    name, *arguments = command.words[1:]
    if name.startswith("-"):
        assert name in ("--install-completion",)
        return
    assert COMMANDS[name].make_context(name, list(arguments)).args == []


@pytest.mark.parametrize("command", of("python"), ids=str)
def test_options_of_a_script_are_its_own(command: Command) -> None:
    script = ROOT / command.words[1]
    assert script.is_file()
    given = {word for word in command.words if word.startswith("--")}
    assert given <= (options_of(script) if given else set())


@functools.cache
def options_of(script: Path) -> set[str]:
    words = [sys.executable, str(script), "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return set(re.findall(r"--[\w-]+", done.stdout))


@pytest.mark.parametrize("command", of("make"), ids=str)
def test_a_target_is_one_of_the_makefile(command: Command) -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{word}:", makefile, re.MULTILINE) for word in command.words[1:])


@pytest.mark.parametrize("command", of("pip"), ids=str)
def test_an_extra_is_one_of_the_project(command: Command) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    named = {e for word in command.words for e in re.findall(r"ssmc\[(\w+)\]", word)}
    assert named <= extras.keys()
    folders = [word for word in command.words[2:] if word.startswith("./")]
    assert all((ROOT / folder / "pyproject.toml").is_file() for folder in folders)


def test_no_command_is_left_out() -> None:
    """Each is run, parsed, or looked up, and few of ssmc's cannot run."""
    assert len(FOUND) > 50
    assert {c.program for c in FOUND} <= {"ssmc", "python", "make", "pip", "lm_eval"}
    ssmc = of("ssmc")
    assert sum(needs(c) is None for c in ssmc) > len(ssmc) / 2
    if importlib.util.find_spec("lm_eval") is None:
        assert all(needs(c) for c in ssmc if "--tasks" in c.words)
