"""The reference pages agree with the program: options, exit codes, passes, fields, links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import ssmc
from ssmc import errors
from ssmc.cli.main import app
from ssmc.core import known_passes
from ssmc.recipe import Recipe

from .blocks import ROOT, blocks

DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), *(ROOT / "examples").rglob("*.md")])
COMMANDS = {c.name: c for c in typer.main.get_command(app).commands.values()}  # type: ignore[attr-defined]


def sections(page: Path) -> dict[str, str]:
    """The text below each heading of the second level, by heading."""
    parts = re.split(r"^## (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def section(page: Path, beginning: str) -> str:
    """The first section of a page whose heading begins so."""
    return next(text for title, text in sections(page).items() if title.startswith(beginning))


def rows(text: str) -> Iterator[str]:
    """The first cell of each row of the tables in a text, headings left out."""
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith(("| ---", "| option", "| field")):
            yield line.split("|")[1].strip()


def test_every_command_is_described() -> None:
    described = re.findall(r"^`ssmc ([\w-]+)", "\n".join(sections(DOCS / "cli.md")), re.MULTILINE)
    assert sorted(described) == sorted(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_options_are_those_of_the_program(name: str) -> None:
    described = set(
        re.findall(r"-[\w-]+", "\n".join(rows(section(DOCS / "cli.md", f"`ssmc {name}"))))
    )
    options = {o for p in COMMANDS[name].params if p.param_type_name == "option" for o in p.opts}
    assert described == options - {"--help"}


def test_exit_codes() -> None:
    codes = set(
        map(int, rows(section(DOCS / "cli.md", "Exit codes").replace("| code |", "| --- |")))
    )
    classes = [e for e in vars(errors).values() if isinstance(e, type) and hasattr(e, "exit_code")]
    assert codes == {0, 130} | {e.exit_code for e in classes}


def test_recipes_in_the_reference_can_be_planned(tmp_path: Path) -> None:
    from ssmc.recipe import read_recipe

    found = [b for b in blocks(DOCS / "cli.md") if b.language == "yaml"]
    assert len(found) == 2
    for block in found:
        (tmp_path / "recipe.yaml").write_text(block.text)
        recipe = read_recipe(tmp_path / "recipe.yaml")
        assert [p.name for p in recipe.plan()][-1] == "quantise"


def test_recipes_are_listed() -> None:
    from ssmc.catalogue import builtin_recipes

    bullets = re.findall(r"^- (.*?):", section(DOCS / "cli.md", "`ssmc recipes"), re.MULTILINE)
    listed = re.findall(r"`([\w-]+)`", " ".join(bullets))
    assert sorted(listed) == sorted(builtin_recipes())


def test_passes_are_listed_in_the_readme() -> None:
    listed = set(re.findall(r"`([\w-]+)`", "\n".join(rows(section(ROOT / "README.md", "Passes")))))
    assert listed == {name for name in known_passes() if ssmc.core.passes.origin(name) == "ssmc"}


@pytest.mark.parametrize("file", ["ssmc.json", "graph.json", "report.json"])
def test_fields_of_an_artefact(file: str, artefact_fields: dict[str, set[str]]) -> None:
    described = "\n".join(rows(section(DOCS / "artefact.md", f"`{file}`")))
    assert set(re.findall(r"`(\w+)`", described)) == artefact_fields[file]


@pytest.fixture(scope="module")
def artefact_fields(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The top-level fields of the JSON files of an artefact of the embedded model."""
    import json

    out = tmp_path_factory.mktemp("artefact") / "out"
    ssmc.compile("demo", passes="absmax", samples=1, length=16).save(out)
    return {path.name: set(json.loads(path.read_text())) for path in out.glob("*.json")}


def test_recipe_fields_are_options_of_compile() -> None:
    options = {p.name for p in COMMANDS["compile"].params}
    assert set(Recipe.model_fields) <= options


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", prose)
    assert [link for link in links if not (page.parent / link).exists()] == []
