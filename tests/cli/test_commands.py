"""`ssmc passes`, `ssmc doctor`, and the application around every command."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Any

import pytest

import ssmc
from ssmc.cli import doctor

from .conftest import Call, legible, on_terminal


def test_passes(call: Call) -> None:
    lines = legible(call("passes"))
    names = {line.split()[1] for line in lines[1:] if not line.startswith(" ")}
    assert {"hadamard", "percentile", "quantise", "fold-norm", "ssm-sites"} <= names
    rows = call("passes", "--json").json["passes"]
    assert {row["name"] for row in rows} == names
    only = call("passes", "--stage", "calibrate", "--json").json["passes"]
    assert {row["name"] for row in only} == {"absmax", "percentile"}


def test_one_pass(call: Call) -> None:
    lines = legible(call("passes", "percentile"))
    assert lines[0].startswith("percentile   stage calibrate, from ssmc")
    assert any(line.startswith("Replaces:") for line in lines)
    assert "option p: float = 0.99999" in lines
    (row,) = call("passes", "percentile", "--json").json["passes"]
    assert row["options"]["p"]["default"] == 0.99999
    assert Path(row["source"].rpartition(":")[0]).is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["percentil"], "did you mean percentile?"),
        (["--stage", "calib"], "did you mean calibrate?"),
    ],
)
def test_passes_refuses(call: Call, arguments: list[str], message: str) -> None:
    ended = call("passes", *arguments)
    assert ended.code == 2
    assert message in ended.error


def test_a_plugin_that_does_not_load_hides_no_other(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "faulty-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ssmc.passes]\nfaulty = no_such_module:Faulty\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    ended = call("passes")
    assert ended.code == 0
    assert "hadamard" in ended.out
    assert "warning: pass 'faulty' of faulty 1.0 cannot be loaded" in ended.err
    assert call("passes", "--json").json["broken"].keys() == {"faulty"}
    assert call("passes", "faulty").code == 2


def test_doctor(call: Call) -> None:
    lines = legible(call("doctor"))
    assert any(line.startswith("torch ") and version("torch") in line for line in lines)
    data = call("doctor", "--json").json
    assert data["devices"][0] == "cpu"
    for row in data["packages"]:
        assert (row["version"] is None) == (row["install"] is not None)
        if row["install"]:
            assert any(row["install"] in line for line in lines), "with its extra in brackets"
    always = data["features"][0]
    assert (always["missing"], always["install"]) == ([], None)


def test_doctor_knows_every_extra() -> None:
    extras = set(metadata("ssmc").get_all("Provides-Extra") or ()) - {"dev"}
    assert {feature.extra for feature in doctor.FEATURES} == extras | {None}


def test_doctor_says_what_a_feature_lacks(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"matplotlib": "3.1"}

    def found(name: str) -> str:
        if name == "triton":
            raise PackageNotFoundError(name)
        return installed.get(name) or version(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", found)
    features = {row["command"]: row for row in call("doctor", "--json").json["features"]}
    plots = features["ssmc compile --report, ssmc bench --plot"]
    assert (plots["missing"], plots["install"]) == (
        ["matplotlib>=3.9"],
        "pip install 'ssmc[bench]'",
    )
    gpu = features["--device cuda"]
    assert gpu["missing"] == ["triton>=3.6", "a CUDA device"]
    assert gpu["install"] == "pip install 'ssmc[cuda]'"


def test_doctor_of_a_folder_that_is_not_installed(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "requires", missing)
    ended = call("doctor")
    assert ended.code == 2
    assert "pip install -e ." in ended.error


def test_help_and_version(call: Call) -> None:
    assert call().out == call("--help").out
    assert call("--help").code == 0
    assert call("--version").out == f"ssmc {ssmc.__version__}\n"
    for command in ("compile", "passes", "inspect", "eval", "generate", "verify", "doctor"):
        lines = legible(call(command, "--help"))
        assert any("--json" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evl"], "eval"),
        (["eval"], "Missing argument"),
        (["eval", "demo", "more"], "unexpected extra argument"),
        (["--nonsense"], "No such option"),
    ],
)
def test_wrong_usage_is_one_message(call: Call, arguments: list[str], message: str) -> None:
    ended = call(*arguments)
    assert ended.code == 2
    assert message in ended.error
    assert "--help'" in ended.error
    assert ended.out == ""


def test_a_defect_says_so(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssmc.cli import output

    def broken(*args: Any) -> None:
        raise AttributeError("no such thing")

    monkeypatch.setattr(output, "say_table", broken)
    ended = call("passes")
    assert ended.code == 1
    assert "AttributeError: no such thing" in ended.error
    assert "--debug" in ended.error


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def test_help_does_not_import_torch() -> None:
    script = (
        "import sys\nsys.argv = ['ssmc', 'compile', '--help']\n"
        "from ssmc.cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])\n"
    )
    assert run("-c", script).stdout.splitlines()[-1] == "[]"


def test_a_process_of_its_own(tiny_artefact: Path) -> None:
    ended = run("-m", "ssmc", "eval", str(tiny_artefact), "--text", "nowhere.jsonl")
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith("error: cannot read nowhere.jsonl")


def test_a_reader_that_leaves_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "ssmc", "--version"]
    env = os.environ | {"PYTHONUNBUFFERED": ""}  # so that the write comes with the last flush
    ended = subprocess.run(
        command, stdout=writer, stderr=subprocess.PIPE, text=True, env=env, check=False
    )
    os.close(writer)
    assert ended.returncode == 1
    assert ended.stderr == ""


def test_colour_on_a_terminal_only_and_not_with_no_color() -> None:
    assert "\x1b[1;31merror:" in on_terminal("-m", "ssmc", "nosuch")
    plain = on_terminal("-m", "ssmc", "nosuch", NO_COLOR="1")
    assert "No such command" in plain
    assert "\x1b[1;31m" not in plain
