"""The tutorials' Python runs top to bottom, prints what it says, and is the example's text."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from ssmc.catalogue import builtin_passes
from ssmc.core import passes

from .blocks import ROOT, Block, blocks

TUTORIAL = ROOT / "docs" / "write-your-own-pass.md"
TUTORIALS = {"write-your-own-pass": 7, "bring-your-own-model": 3, "add-an-architecture": 2}
"""Pages, and how many of their blocks are output."""
EXAMPLE = ROOT / "examples" / "round_a_pass"
ERROR = re.compile(r"\d\.\de[+-]\d\d")  # a measured error: its last digit is the machine's


@pytest.fixture
def _forgotten() -> Iterator[None]:
    """What the tutorial registers is unknown to the tests after it."""
    known = {*passes._registered, *builtin_passes()}
    yield
    for name in passes._registered.keys() - known:
        del passes._registered[name]


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch) -> dict:
    """The globals of a module, in which a dataclass finds its types."""
    module = ModuleType("tutorial")
    monkeypatch.setitem(sys.modules, "tutorial", module)
    return vars(module)


def run(block: Block, namespace: dict) -> None:
    """Execute a block so that an error names the line of the page."""
    source = "\n" * (block.line - 1) + block.text
    exec(compile(source, str(block.path), "exec"), namespace)


def check_output(actual: str, block: Block) -> None:
    """The text is the same, measured errors apart, and those are within a quarter."""
    assert ERROR.sub("#", actual) == ERROR.sub("#", block.text), f"line {block.line}"
    measured, stated = ([float(e) for e in ERROR.findall(t)] for t in (actual, block.text))
    assert measured == pytest.approx(stated, rel=0.25)


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize("page", TUTORIALS)
def test_every_block_runs_and_prints_what_is_below_it(
    page: str,
    namespace: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    printed = 0
    for block in blocks(ROOT / "docs" / f"{page}.md"):
        if block.language == "python":
            assert capsys.readouterr().out == "", f"output of the block before line {block.line}"
            run(block, namespace)
        elif block.language == "text":
            check_output(capsys.readouterr().out, block)
            printed += 1
    assert capsys.readouterr().out == ""
    assert printed >= TUTORIALS[page]


@pytest.mark.parametrize(
    ("language", "file"), [("python", "round_a.py"), ("toml", "pyproject.toml")]
)
def test_the_package_in_it_is_the_example(language: str, file: str) -> None:
    text = (EXAMPLE / file).read_text(encoding="utf-8")
    assert text in [block.text for block in blocks(TUTORIAL) if block.language == language]
