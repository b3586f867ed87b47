"""The README's Python runs, on the embedded model."""

from __future__ import annotations

from pathlib import Path

import pytest

from .blocks import ROOT, blocks


def test_python_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for block in blocks(ROOT / "README.md"):
        if block.language == "python":
            exec(compile(block.text, str(block.path), "exec"), namespace)
    out = capsys.readouterr().out
    assert out.startswith("The President of the United States")
    assert "quantise 50 matched 0 skipped" in out
    assert (tmp_path / "out" / "ssmc.json").is_file()
