"""`ssmc compile`: what it writes, what it shows, what it refuses."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ssmc
from ssmc.runtime import artefact, is_artefact

from .conftest import Call, on_terminal

ON_CPU = ("--device", "cpu")  # as the artefacts compared with; other devices round differently
SHORT = ("--samples", 4, "--length", 32, *ON_CPU)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_writes_an_artefact_and_shows_each_pass(
    call: Call, tiny_folder: Path, tiny_artefact: Path, tmp_path: Path
) -> None:
    text = tiny_folder / "text.txt"
    ended = call("compile", tiny_folder, "--calibration", text, *SHORT, "-o", tmp_path / "out")
    assert ended.code == 0
    assert contents(tmp_path / "out") == contents(tiny_artefact)
    lines = ended.out.splitlines()
    shown = [line.split()[0] for line in lines if " matched, " in line]
    assert shown == [r["name"] for r in ssmc.load(tmp_path / "out").report["passes"]]
    assert f"wrote        {tmp_path / 'out'}" in lines
    assert "0 kept in float" in ended.out
    assert max(map(len, lines)) <= 100
    assert "\x1b" not in ended.out + ended.err
    assert ended.err.startswith("loading ")


def test_json_is_one_object(call: Call, tiny_folder: Path, tmp_path: Path) -> None:
    text, out = tiny_folder / "text.txt", tmp_path / "out"
    data = call("compile", tiny_folder, "--calibration", text, *SHORT, "-o", out, "--json").json
    assert data["out"] == str(out)
    assert data["size"]["model.safetensors"] == (out / "model.safetensors").stat().st_size
    assert data["lowered"]["kept"] == []
    assert data["lowered"]["fused"] == 1 + 3 * 8 + 2
    assert data["passes"][-1]["name"] == "quantise"
    assert {"probe_signal_to_noise_db", "probe_top1_agreement"} == data["metrics"].keys()


def test_a_recipe_of_an_artefact_gives_the_same_bytes(
    call: Call, tiny_folder: Path, tiny_artefact: Path, tmp_path: Path
) -> None:
    recipe, out = tiny_artefact / "ssmc.json", tmp_path / "out"
    assert call("compile", tiny_folder, "--recipe", recipe, *ON_CPU, "-o", out).code == 0
    assert contents(out) == contents(tiny_artefact)


def test_options_go_over_the_recipe(call: Call, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("passes: [smooth, absmax]\nsamples: 3\n")
    arguments = ("--recipe", tmp_path / "r.yaml", "--samples", 5, "--dry-run", "--json")
    data = call("compile", "demo", *arguments).json
    assert data["recipe"]["samples"] == 5
    assert data["recipe"]["passes"] == ["smooth", "absmax"]


def test_a_dry_run_shows_the_plan_and_loads_nothing(call: Call) -> None:
    ended = call("compile", "no/such-model", "--passes", "hadamard{block=16}", "--dry-run")
    assert ended.code == 0
    assert ended.err == ""
    rows = [line.split() for line in ended.out.splitlines()[2:]]
    assert ["rewrite", "hadamard{block=16}"] in rows
    assert ["analyse", "ssm-sites", "added"] in rows
    assert rows[-1][:2] == ["quantise", "quantise"]


def test_what_is_left_in_float_is_counted(call: Call, tiny_folder: Path, tmp_path: Path) -> None:
    arguments = ("--calibration", tiny_folder / "text.txt", *SHORT, "-o", tmp_path / "out")
    passes = "absmax,quantise{head=false,embedding=false}"
    ended = call("compile", tiny_folder, "--passes", passes, *arguments)
    assert "2 kept in float" in ended.out
    assert "skipped lm_head: head=false" in ended.out


LAYERS, IN, OUT = 8, (1024, 256), (256, 512)  # of the embedded model: in_proj and out_proj


@pytest.mark.parametrize(("scheme", "bits"), [("w4a8", 4), ("w4a16", 4), ("w3a16", 3)])
def test_gptq_and_the_bytes_of_weights_in_few_bits(
    call: Call, tmp_path: Path, scheme: str, bits: int
) -> None:
    out = tmp_path / "out"
    few = ("--samples", 2, "--length", 64, *ON_CPU, "-o", out)
    ended = call("compile", "demo", "--passes", "hadamard,absmax,gptq", "--scheme", scheme, *few)
    assert ended.code == 0
    assert "absmax +quantise gptq" in ended.out
    assert "of the squared error of nearest integers" in ended.out
    assert max(map(len, ended.out.splitlines())) <= 100
    tensors = load_file(out / "model.safetensors")
    packed = {name: t for name, t in tensors.items() if name.endswith(f"_int{bits}")}
    weights = LAYERS * (IN[0] * IN[1] + OUT[0] * OUT[1])
    assert sum(t.nbytes for t in packed.values()) == weights * bits // 8
    scales = [tensors[name.replace(f"_int{bits}", "_scale")] for name in packed]
    assert sum(t.nbytes for t in scales) == weights // 128 * 2
    shown = float(ended.out.split("size         ")[1].split(" MB")[0])
    assert shown == pytest.approx((out / "model.safetensors").stat().st_size / 1e6, abs=0.005)
    assert call("verify", out, "--length", 17).code == 0


BAD: list[tuple[list[Any], int, str]] = [
    (["nosuchmodel"], 2, "there is no model 'nosuchmodel'"),
    (["dem"], 2, "did you mean demo?"),
    (["{tmp}"], 2, "has no config.json"),
    (["{tmp}/lstm"], 3, ""),
    (["demo", "--passes", "hadamrd"], 2, "did you mean hadamard?"),
    (["demo", "--passes", "hadamard{blok=8}"], 2, "did you mean block?"),
    (["demo", "--passes", "hadamard{block=eight}"], 2, "option 'block'"),
    (["demo", "--passes", "hadamard{block"], 2, "cannot read the passes at"),
    (["demo", "--passes", "percentile,hadamard"], 2, "impossible order"),
    (["demo", "--passes", "hadamard{block=7}"], 2, "7"),
    (["demo", "--scheme", "w8a9"], 2, "did you mean w8a8"),
    (["demo", "--scheme", "w5a16"], 2, "did you mean w8a16 or w4a16"),
    (["demo", "--passes", "gptq,percentile"], 2, "impossible order"),
    (["demo", "--passes", "gptq{damping=-1}"], 2, "at least 0"),
    (["demo", "--passes", "quantise{weights=4,group=3}"], 2, "multiple of 2"),
    (["demo", "--backend", "cpuu"], 2, "did you mean cpu?"),
    (["demo", "--device", "cudaa"], 2, "did you mean cuda"),
    (["demo", "--samples", "0"], 2, "samples: Input should be greater than or equal to 1"),
    (["demo", "--samples", "few"], 2, "'--samples'"),
    (["demo", "--recipe", "{tmp}/no.yaml"], 2, "cannot read recipe"),
    (["demo", "--calibration", "{tmp}/no.jsonl"], 2, "No such file"),
    (["demo", "--calibration", "{tmp}"], 2, "Is a directory"),
    (["demo", "--calibration", "{tmp}/empty.jsonl"], 2, "empty.jsonl holds no text"),
    (["demo", "--calibration", "{tmp}/broken.jsonl"], 2, "broken.jsonl:2: broken JSON"),
    (["demo", "--calibration", "{tmp}/short.txt"], 2, "fewer than one window of 512"),
    (["demo", "--pases", "x"], 2, "No such option: --pases"),
]


@pytest.fixture
def bad_files(tmp_path: Path) -> Path:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "short.txt").write_text("A few words.")
    (tmp_path / "lstm").mkdir()
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 1}
    (tmp_path / "lstm" / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(("arguments", "code", "message"), BAD, ids=[" ".join(b[0]) for b in BAD])
def test_bad_input_gets_one_message_and_writes_nothing(
    call: Call, bad_files: Path, arguments: list[str], code: int, message: str
) -> None:
    before = sorted(bad_files.iterdir())
    given = [a.replace("{tmp}", str(bad_files)) for a in arguments]
    ended = call("compile", *given, "-o", bad_files / "out")
    assert ended.code == code, ended.err
    assert message in ended.error
    assert "\n" in ended.error or "should be" in ended.error, "says what to do next"
    assert sorted(bad_files.iterdir()) == before


def test_without_an_output_folder(call: Call) -> None:
    ended = call("compile", "demo")
    assert ended.code == 2
    assert ended.error == "error: no output folder\n  add -o OUT"


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_missing_device(call: Call, tmp_path: Path) -> None:
    ended = call("compile", "demo", "--device", "cuda", "-o", tmp_path / "out")
    assert ended.code == 4
    assert "there is no device cuda" in ended.error


def test_output_folders_that_will_not_do(call: Call, spoilt: Path) -> None:
    (spoilt.parent / "full").mkdir()
    (spoilt.parent / "full" / "notes").write_text("mine")
    (spoilt.parent / "file").write_text("mine")
    for name, message in [
        ("artefact", "--force replaces it"),
        ("full", "is not empty and no artefact"),
        ("file", "file is a file"),
        ("file/out", "file is a file"),
    ]:
        ended = call("compile", "demo", "-o", spoilt.parent / name)
        assert ended.code == 2
        assert message in ended.error
        assert "loading" not in ended.err, "said before the work, not after it"


def test_nan_in_the_weights_is_named(call: Call, tiny_folder: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("dt_proj.weight"))
    tensors[name][1, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ended = call("compile", folder, "-o", tmp_path / "out")
    assert ended.code == 1
    assert name in ended.error
    (folder / "model.safetensors").write_bytes(b"\x80\x04pickled")
    ended = call("compile", folder, "-o", tmp_path / "out")
    assert ended.code == 2
    assert "model.safetensors" in ended.error


def compile_tiny(call: Call, folder: Path, out: Path, *more: str) -> Any:
    return call("compile", folder, "--calibration", folder / "text.txt", *SHORT, "-o", out, *more)


def test_a_full_disk(
    call: Call, tiny_folder: Path, spoilt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(artefact, "save_file", full)
    before = contents(spoilt)
    ended = compile_tiny(call, tiny_folder, spoilt, "--force")
    assert ended.code == 2
    assert "the disk is full" in ended.error
    assert contents(spoilt) == before
    assert [p.name for p in spoilt.parent.iterdir()] == ["artefact"]


def break_pass(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    from ssmc.core import find_pass

    def run(*args: Any) -> None:
        raise error

    monkeypatch.setattr(find_pass("quantise"), "run", run)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("by zero"), 1, "pass quantise failed: ZeroDivisionError: by zero"),
        (MemoryError(), 4, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), 4, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 4, "out of memory"),
    ],
)
def test_a_pass_that_ends_badly(
    call: Call,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    message: str,
) -> None:
    break_pass(monkeypatch, error)
    ended = compile_tiny(call, tiny_folder, tmp_path / "out")
    assert ended.code == code
    assert message in ended.error
    assert not (tmp_path / "out").exists()
    left = {p.name for p in tmp_path.iterdir()}
    assert left == (set() if code == 130 else {"out.crash"})


def test_debug_shows_the_traceback(
    call: Call, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssmc.cli.main import main
    from ssmc.errors import PassError

    break_pass(monkeypatch, ZeroDivisionError("by zero"))
    text = str(tiny_folder / "text.txt")
    arguments = ["compile", str(tiny_folder), "--calibration", text, "--samples", "4"]
    arguments += ["--length", "32", "-o", str(tmp_path / "out"), "--debug"]
    monkeypatch.setattr(sys, "argv", ["ssmc", *arguments])
    with pytest.raises(PassError) as caught:
        main()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_ctrl_c_in_the_middle_leaves_nothing_but_progress(tmp_path: Path) -> None:
    out = tmp_path / "work" / "out"
    command = [sys.executable, "-m", "ssmc", "compile", "demo", "-o", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("fold-a-log"):  # the next, percentile, takes a while
                break
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "error: interrupted" in err
    assert "Traceback" not in err
    assert not is_artefact(out)
    left = [path.name for path in out.parent.iterdir()] if out.parent.exists() else []
    if "--resume goes on" in err:  # on a machine so slow that progress was kept after 30 s
        assert left == ["out.progress"]
    else:
        assert list(tmp_path.iterdir()) == []


def test_infinity_in_an_activation_is_named(call: Call, tiny_folder: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith("1.mixer.in_proj.weight"):
            tensors[name] = torch.full_like(tensors[name], 3e38)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ended = compile_tiny(call, folder, tmp_path / "out")
    assert ended.code == 1
    assert "backbone_layers_1_mixer" in ended.error
    assert "holds NaN or infinity" in ended.error
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_pass_that_breaks_on_a_terminal_gives_the_cursor_back(
    tiny_folder: Path, tmp_path: Path
) -> None:
    script = (
        "import ssmc.passes.quantise as q\n"
        "def run(*a): raise ValueError('broken')\n"
        "q.Quantise.run = run\n"
        "from ssmc.cli.main import main\nmain()\n"
    )
    arguments = ["compile", str(tiny_folder), "--samples", "1", "-o", str(tmp_path / "out")]
    shown = on_terminal("-c", script, *arguments)
    assert "pass quantise failed" in shown
    assert shown.index("pass quantise failed") > shown.rindex("\x1b[?25h")
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
