"""The site builds strictly, from what mkdocs.yml and docs/ hold, and has every pass."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ssmc.core import find_pass, known_passes
from ssmc.core.passes import origin

from .blocks import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(out)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_page_is_in_the_navigation(site: Path) -> None:
    text = yaml.dump(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    named = set(re.findall(r"[\w-]+\.md", text))
    assert named == {p.name for p in (ROOT / "docs").glob("*.md")} | {"index.md", "passes.md"}
    assert all((site / name).with_suffix(".html").is_file() for name in named)


def test_the_catalogue_has_every_pass_with_its_options(site: Path) -> None:
    page = (site / "passes.html").read_text(encoding="utf-8")
    for name in known_passes():
        if origin(name) == "ssmc":
            assert f'id="{name}"' in page
            for option in find_pass(name)().options():
                assert f"<code>{option}</code>" in page


def test_the_site_asks_for_nothing_from_elsewhere(site: Path) -> None:
    for page in site.glob("*.html"):
        loaded = re.findall(
            r"<(?:script|link|img)[^>]+(?:src|href)=\"(https?:[^\"]+)", page.read_text()
        )
        assert loaded == []


def test_links_out_of_the_site_are_told_as_text(site: Path) -> None:
    index = (site / "index.html").read_text(encoding="utf-8")
    assert "ssmc/demo/README.md" in index
    assert 'href="ssmc/demo/README.md"' not in index
    assert 'href="cli.html"' in index
