"""`ssmc export`."""

from __future__ import annotations

from pathlib import Path

from .conftest import Call, legible


def test_export_says_what_it_wrote(call: Call, tiny_artefact: Path, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    lines = legible(call("export", tiny_artefact, "-o", out))
    assert lines[0].split() == ["file", "bytes"]
    assert lines[-2].split() == ["wrote", str(out)]
    assert lines[-1].split(maxsplit=1) == ["for", "transformers, once ssmc is installed"]
    data = call("export", tiny_artefact, "-o", out, "--force", "--json").json
    assert data["files"] == {path.name: path.stat().st_size for path in out.iterdir()}


def test_what_cannot_be_exported(call: Call, tiny_artefact: Path, tmp_path: Path) -> None:
    ended = call("export", tmp_path)
    assert ended.code == 2
    assert "is no artefact" in ended.error
    ended = call("export", tiny_artefact, "--format", "gguf2", "-o", tmp_path / "x")
    assert ended.code == 2
    assert "there is no format 'gguf2'" in ended.error


def test_gguf_is_one_file(call: Call, tiny_artefact: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny.gguf"
    lines = legible(call("export", tiny_artefact, "--format", "gguf", "-o", out))
    assert lines[1].split()[0] == "tiny.gguf"
    assert any(line.startswith("in 16 bits") and "multiples of 32" in line for line in lines)
    assert any(line.startswith("note") and "no vocabulary" in line for line in lines)
    data = call(
        "export", tiny_artefact, "--format", "gguf", "--type", "f32", "-o", out, "--force", "--json"
    ).json
    assert data["files"] == {"tiny.gguf": out.stat().st_size}
    assert data["kept"] == {}
    assert len(data["notes"]) == 3
    ended = call("export", tiny_artefact, "--format", "gguf", "--type", "q9", "-o", out)
    assert ended.code == 2
    assert "has no type 'q9'" in ended.error
