"""Artefacts are written whole or not at all, and never over what is not one."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tiny import compile_tiny

import ssmc
from ssmc.errors import UsageError
from ssmc.runtime import CompiledModel, artefact
from ssmc.runtime.artefact import GRAPH


@pytest.fixture(scope="module")
def compiled() -> CompiledModel:
    return compile_tiny("mamba2")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def left_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_an_empty_folder_and_missing_parents_are_fine(
    compiled: CompiledModel, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    ssmc.load(compiled.save(tmp_path / "empty"))
    ssmc.load(compiled.save(tmp_path / "some" / "where" / "out"))
    assert left_in(tmp_path) == ["empty", "some"]
    assert left_in(tmp_path / "some" / "where") == ["out"]


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_with_other_things_is_left_alone(
    compiled: CompiledModel, tmp_path: Path, force: bool
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty and no artefact"):
        compiled.save(tmp_path, force=force)
    assert left_in(tmp_path) == ["notes.txt"]


def test_an_artefact_is_replaced_with_force_only(compiled: CompiledModel, spoilt: Path) -> None:
    before = contents(spoilt)
    with pytest.raises(UsageError, match="already holds an artefact") as caught:
        compiled.save(spoilt)
    assert "--force" in (caught.value.hint or "")
    assert contents(spoilt) == before
    compiled.save(spoilt, force=True)
    assert contents(spoilt)[GRAPH] != before[GRAPH]
    ssmc.load(spoilt)
    assert left_in(spoilt.parent) == ["artefact"]


def test_force_keeps_files_that_are_no_part_of_an_artefact(
    compiled: CompiledModel, spoilt: Path
) -> None:
    (spoilt / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"holds 'thesis.tex'"):
        compiled.save(spoilt, force=True)
    assert (spoilt / "thesis.tex").read_text() == "years of work"


def test_a_file_in_the_way_is_named(compiled: CompiledModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file is a file"):
        compiled.save(tmp_path / "file")
    with pytest.raises(UsageError, match="file is a file"):
        compiled.save(tmp_path / "file" / "below" / "out")
    assert left_in(tmp_path) == ["file"]


def test_the_current_folder_is_not_replaced(
    compiled: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="is the current folder"):
        compiled.save(".")


def test_a_folder_without_permission_is_named(
    compiled: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UsageError, match=f"{tmp_path} is not writable"):
        compiled.save(tmp_path / "out")


def test_a_link_is_followed(compiled: CompiledModel, spoilt: Path) -> None:
    link = spoilt.parent / "link"
    link.symlink_to(spoilt)
    before = contents(spoilt)
    compiled.save(link, force=True)
    assert link.is_symlink()
    assert contents(spoilt) != before
    assert left_in(spoilt.parent) == ["artefact", "link"]


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def broken(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


STEPS = ["save_file", "write_json", "sync", "_entry"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_leaves_what_was_there(
    compiled: CompiledModel, spoilt: Path, monkeypatch: pytest.MonkeyPatch, step: str, there: bool
) -> None:
    before = contents(spoilt)
    out = spoilt if there else spoilt.parent / "new" / "out"
    monkeypatch.setattr(artefact, step, full)
    with pytest.raises(UsageError, match="the disk is full"):
        compiled.save(out, force=there)
    assert left_in(spoilt.parent) == ["artefact"]
    assert contents(spoilt) == before


@pytest.mark.parametrize("step", [*STEPS, "rename"])
@pytest.mark.parametrize("there", [False, True])
def test_an_interruption_leaves_what_was_there(
    compiled: CompiledModel, spoilt: Path, monkeypatch: pytest.MonkeyPatch, step: str, there: bool
) -> None:
    before = contents(spoilt)
    rename = Path.rename

    def second_breaks(self: Path, target: Path) -> Path:
        return broken() if self.suffix == ".part" else rename(self, target)  # type: ignore[return-value]

    if step == "rename":
        monkeypatch.setattr(Path, "rename", second_breaks)
    else:
        monkeypatch.setattr(artefact, step, broken)
    with pytest.raises(KeyboardInterrupt):
        compiled.save(spoilt if there else spoilt.parent / "new" / "out", force=there)
    assert left_in(spoilt.parent) == ["artefact"]
    assert contents(spoilt) == before


def test_a_disk_that_is_really_full(compiled: CompiledModel, tmp_path: Path) -> None:
    """On a file system of 64 KiB, where one may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        with pytest.raises(UsageError, match="the disk is full"):
            compiled.save(disk / "out")
        assert left_in(disk) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
