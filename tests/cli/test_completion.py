"""What the shell completes: asked as bash, zsh and fish ask, and without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssmc.bench.sizes import SIZES
from ssmc.catalogue import builtin_recipes
from ssmc.cli import completion
from ssmc.core import known_passes
from ssmc.core.passes import STAGES, origin
from ssmc.device import NAMES
from ssmc.export import FORMATS
from ssmc.lowering import BACKENDS
from ssmc.recipe import SCHEMES


def ask(line: str, place: Path, shell: str = "bash") -> list[str]:
    """The words that a shell gets for a line with the cursor at its end."""
    last = len(line.split(" ")) - 1
    asked = {
        "bash": {"COMP_WORDS": line, "COMP_CWORD": str(last)},
        "zsh": {"_TYPER_COMPLETE_ARGS": line},
        "fish": {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    done = subprocess.run(
        [sys.executable, "-m", "ssmc"], cwd=place, capture_output=True, text=True, check=True,
        env=os.environ | asked | {"_SSMC_COMPLETE": f"complete_{shell}"},
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.fixture
def place(tiny_artefact: Path, tiny_folder: Path, tmp_path: Path) -> Path:
    """A folder with an artefact, a folder of models, a recipe, and what is none of these."""
    (tmp_path / "dim").symlink_to(tiny_artefact)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "model").symlink_to(tiny_folder)
    (tmp_path / "mine.yaml").write_text("passes: absmax\n")
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".hidden").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ssmc e", ["eval", "export"]),
        ("ssmc bench --ttf", ["--ttft"]),
        ("ssmc eval d", ["demo", "dim"]),
        ("ssmc passes perc", ["percentile"]),
        ("ssmc compile demo --passes hadamard,perc", ["hadamard,percentile"]),
        ("ssmc compile demo --recipe quamba2-w4", ["quamba2-w4a16", "quamba2-w4a8"]),
        ("ssmc eval demo --backend ", ["auto", "reference", "cpu", "triton"]),
    ],
)
def test_bash(line: str, expected: list[str], place: Path) -> None:
    assert ask(line, place) == expected


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells(shell: str, place: Path) -> None:
    found = ask("ssmc compile demo --passes hadamard,perc", place, shell)
    assert "hadamard,percentile" in "".join(found)


def test_folders_lead_to_models(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert completion.target("") == ["demo", "dim", "more/"]
    assert completion.target("more/") == ["more/model"]
    assert completion.target(".h") == [".hidden/"]
    assert completion.target("nowhere/") == []
    assert completion.artefact("d") == ["dim"]
    assert completion.target_or("none")("n") == ["none"]
    assert completion.recipe("") == [*builtin_recipes(), "mine.yaml"]


def test_lists_of_passes() -> None:
    found = completion.pass_list("")
    assert found == completion.one_pass("")
    assert found == [name for name in known_passes() if origin(name) == "ssmc"]
    assert completion.pass_list("hadamard{block=8},smo") == ["hadamard{block=8},smooth"]
    assert completion.pass_list("hadamard{bl") == []


def test_closed_lists_are_those_of_the_program() -> None:
    assert completion.BACKENDS("") == ["auto", *BACKENDS]
    assert completion.DEVICES("") == list(NAMES)
    assert set(completion.SCHEMES("")) == {*SCHEMES, "auto"}
    assert completion.STAGES("") == list(STAGES)
    assert completion.FORMATS("") == list(FORMATS)
    assert completion.GGUF_TYPES("") == list(FORMATS["gguf"].types)
    assert completion.SIZES("") == list(SIZES)


def test_completion_does_not_import_torch() -> None:
    script = (
        "import sys\nsys.argv = ['ssmc']\n"
        "from ssmc.cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])\n"
    )
    asked = {"_SSMC_COMPLETE": "complete_bash", "COMP_CWORD": "4"}
    env = os.environ | asked | {"COMP_WORDS": "ssmc compile demo --passes fold-n"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["fold-norm", "[]"]
