"""Compiling with little memory, and going on after a kill: the same artefact, byte by byte."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import write_model

import ssmc
from ssmc.core import journal
from ssmc.core.journal import MANIFEST, Journal, Log
from ssmc.errors import UsageError

PASSES = "hadamard,smooth,percentile,gptq{asymmetric=true,sweeps=1}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model, with a text."""
    return write_model(tmp_path_factory.mktemp("model"))


def files(folder: Path) -> dict[str, bytes]:
    """What an artefact consists of."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def given(folder: Path, **options: Any) -> dict[str, Any]:
    """What a small compilation is called with."""
    text = str(folder / "text.txt")
    return {"calibration": text, "samples": 4, "length": 24, "passes": PASSES} | options


class Stopped(BaseException):
    """What no code expects: the end of a process, for a test."""


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`stop_after(n)`: progress is kept after each step, and the n-th time is the last."""
    monkeypatch.setattr(journal, "INTERVAL", 0.0)
    save = Log.save

    def stopping(count: int) -> None:
        left = [count]

        def saved(self: Log, *args: Any) -> None:
            save(self, *args)
            left[0] -= 1
            if not left[0]:
                raise Stopped

        monkeypatch.setattr(Log, "save", saved)

    return stopping


# A process that compiles in children that are killed: what takes seconds, the imports, is done when
# they begin. One that ends leaves its artefact, and the next begins anew.
DRIVER = """
import json, os, random, signal, sys, time
import torch
import ssmc
from ssmc.core import journal

torch.set_num_threads(1)
journal.INTERVAL = 0.0
given = json.loads(sys.argv[1])
work, out, kills, model = (given.pop(name) for name in ("work", "out", "kills", "model"))
for _ in range(2):  # kernels are compiled in the first
    start = time.monotonic()
    ssmc.compile(model, **given).save(out, force=True)
seconds = time.monotonic() - start
draw, killed, ended = random.Random(0), [], 0
while not (len(killed) >= kills and ended):
    child = os.fork()
    if child == 0:
        ssmc.compile(model, work=work, resume=True, **given).save(f"{out}-{ended}", force=True)
        os._exit(0)
    if len(killed) < kills:
        time.sleep(draw.uniform(0.1, 1.0) * seconds)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 0:
        ended += 1
    else:
        assert code == -signal.SIGKILL, code
        names = os.listdir(work) if os.path.isdir(work) else []
        killed.append(sum(name.endswith(".safetensors") for name in names))
print(json.dumps({"killed": killed, "ended": ended}))
"""


def test_killed_twenty_times_and_resumed_it_gives_the_same_bytes(
    model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = given(model, model=str(model), work=str(tmp_path / "work"), out=str(out), kills=20)
    ran = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(options)], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert len(told["killed"]) == 20
    assert sum(count > 0 for count in told["killed"]) >= 5, told  # as many left progress behind
    for number in range(told["ended"]):
        assert files(tmp_path / f"out-{number}") == files(out)


@pytest.mark.parametrize("passes", [PASSES, "reconstruct{steps=2,windows=4,length=16},percentile"])
def test_stopped_at_any_step_it_goes_on_from_there(
    model: Path, tmp_path: Path, stop_after: Any, passes: str
) -> None:
    options = given(model, passes=passes)
    ssmc.compile(str(model), **options).save(tmp_path / "whole")
    for count in (1, 2, 3):
        stop_after(count)
        with pytest.raises(Stopped):
            ssmc.compile(str(model), **options, work=tmp_path / "work", resume=count > 1)
        kept = json.loads((tmp_path / "work" / MANIFEST).read_text())
        assert kept["passes"]
    stop_after(1000)
    resumed = ssmc.compile(str(model), **options, work=tmp_path / "work", resume=True)
    resumed.save(tmp_path / "resumed")
    assert files(tmp_path / "resumed") == files(tmp_path / "whole")
    assert not (tmp_path / "work").exists()


def test_passes_that_ended_are_not_checked_again(
    model: Path, tmp_path: Path, stop_after: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssmc.core import pipeline

    checked: list[str] = []
    run = pipeline.run_pass

    def counted(g: Any, p: Any, *args: Any) -> Any:
        checked.append(p.name)
        return run(g, p, *args)

    monkeypatch.setattr(pipeline, "run_pass", counted)
    options = given(model, passes="hadamard,absmax,gptq", work=tmp_path / "work")
    stop_after(6)  # in the middle of gptq
    with pytest.raises(Stopped):
        ssmc.compile(str(model), **options)
    before, checked[:] = checked[:], []
    assert "gptq" in before
    stop_after(1000)
    ssmc.compile(str(model), **options, resume=True)
    assert checked == ["gptq"]


def test_what_was_done_is_not_done_again(
    model: Path, tmp_path: Path, stop_after: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssmc.passes.gptq import Gptq

    rounded: list[str] = []
    choose = Gptq._round

    def counted(self: Gptq, g: Any, linear: Any, *args: Any) -> float:
        rounded.append(linear.name)
        return choose(self, g, linear, *args)

    monkeypatch.setattr(Gptq, "_round", counted)
    options = given(model, passes="absmax,gptq", work=tmp_path / "work")
    for count in range(1, 100):
        stop_after(count if count > 1 else 4)
        try:
            ssmc.compile(str(model), **options, resume=count > 1)
        except Stopped:
            continue
        break
    assert len(rounded) == len(set(rounded)) > 2


@pytest.mark.parametrize(
    ("change", "topic"),
    [
        ({"passes": "hadamard,absmax"}, "recipe: passes "),
        ({"scheme": "w4a16"}, "recipe: "),
        ({"samples": 3}, "recipe: samples 4, here 3"),
        ({"seed": 7}, "recipe: seed 0, here 7"),
    ],
)
def test_the_progress_of_another_recipe_is_refused(
    model: Path, tmp_path: Path, stop_after: Any, change: dict[str, Any], topic: str
) -> None:
    stop_after(2)
    with pytest.raises(Stopped):
        ssmc.compile(str(model), **given(model), work=tmp_path)
    before = files(tmp_path)
    with pytest.raises(UsageError, match=f"holds the progress of another {topic}"):
        ssmc.compile(str(model), **given(model, **change), work=tmp_path, resume=True)
    assert files(tmp_path) == before


def test_the_progress_of_another_model_is_refused(
    model: Path, tmp_path: Path, stop_after: Any
) -> None:
    stop_after(2)
    with pytest.raises(Stopped):
        ssmc.compile(str(model), **given(model), work=tmp_path / "work")
    other = write_model(tmp_path / model.name, "mamba2")
    with pytest.raises(UsageError, match="the progress of another model: fingerprint"):
        ssmc.compile(str(other), **given(model), work=tmp_path / "work", resume=True)


def test_without_resume_it_begins_anew(model: Path, tmp_path: Path, stop_after: Any) -> None:
    stop_after(2)
    with pytest.raises(Stopped):
        ssmc.compile(str(model), **given(model), work=tmp_path / "work")
    stop_after(1000)
    ssmc.compile(str(model), **given(model, passes="absmax"), work=tmp_path / "work")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"passes": {}, "number": 3, "identity": {}}', "\x00"])
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(UsageError, match=r"the progress in .* is damaged"):
        Journal(tmp_path, {}, resume=True)


def test_a_folder_of_something_else_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("all my work")
    with pytest.raises(UsageError, match=r"holds 'thesis.tex'"):
        Journal(tmp_path, {}, resume=False)
    assert (tmp_path / "thesis.tex").exists()


def test_data_that_no_manifest_names_is_swept(tmp_path: Path) -> None:
    (tmp_path / "000007-0.safetensors").write_bytes(b"half a file")
    Journal(tmp_path, {}, resume=True)
    assert not list(tmp_path.glob("*"))


def test_an_error_leaves_no_progress(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"matches no operator|no operator"):
        ssmc.compile(
            str(model),
            **given(model, passes="absmax,quantise{overrides=nothing:w4a16}"),
            work=tmp_path / "work",
        )
    assert not (tmp_path / "work").exists()


def test_nothing_is_resumed_without_a_folder(model: Path) -> None:
    with pytest.raises(UsageError, match="nothing to resume from"):
        ssmc.compile(str(model), **given(model), resume=True)


@pytest.mark.parametrize("name", ["mamba-5m", "jamba-11m"])
def test_a_limit_of_memory_changes_no_byte(shared_model: Any, tmp_path: Path, name: str) -> None:
    folder = str(shared_model(name))
    options = {"samples": 4, "length": 32, "passes": "hadamard,percentile"}
    ssmc.compile(folder, **options).save(tmp_path / "free")
    ssmc.compile(folder, **options, max_memory="20GB", work=tmp_path / "work").save(
        tmp_path / "limited"
    )
    assert files(tmp_path / "limited") == files(tmp_path / "free")


def test_a_limit_that_is_too_low_is_named(model: Path, shared_model: Any) -> None:
    with pytest.raises(UsageError, match="in use beside the weights"):
        ssmc.compile(str(shared_model("mamba-5m")), max_memory="100MB")
