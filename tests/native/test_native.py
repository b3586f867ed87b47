"""Native programs: what they give, in a process without torch, and what they refuse."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from cli.conftest import Call, call
from frontend.models import build, tokens

import ssmc
from ssmc.errors import ArtefactError, DeviceError, UnsupportedError, UsageError
from ssmc.export import export
from ssmc.export.native import pieces_of
from ssmc.native import NativeModel, load
from ssmc.native.model import CODE, PROGRAM, TENSORS
from ssmc.native.sampling import Sampling

__all__ = ["call"]  # the fixture

LENGTHS = ((1,), (16, 1, 1), (31,), (700, 1), (5, 40))
"""The lengths of the calls of each sequence."""
ALONE = """
import json, sys
from ssmc.native import load
model = load(sys.argv[1], int(sys.argv[2]))
for calls in json.load(sys.stdin):
    model.reset()
    for ids in calls:
        logits = model.prefill(ids)
        sys.stdout.buffer.write(bytes(logits))
        assert model.likeliest() == max(range(len(logits)), key=logits.__getitem__)
known = {name.partition(".")[0] for name in sys.modules}
assert not known & {"torch", "numba", "numpy", "transformers", "triton"}, known
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("native")


@pytest.fixture(scope="module")
def demo(demo_folder: Path, programs: Path) -> Path:
    return export(demo_folder, programs / "demo", "native").out


def artefact_of(architecture: str, folder: Path) -> Path:
    """An artefact of a small model, its caches in int8 where it has any."""
    passes = "hadamard,percentile"
    if architecture in ("jamba", "llama"):
        passes = f"{passes},quantise,kv-cache"
    compiled = ssmc.compile(build(architecture), passes=passes, calibration=tokens(4, 33))
    return compiled.save(folder)


@pytest.mark.parametrize("architecture", ["mamba", "mamba2", "jamba", "llama"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_process_without_torch_gives_the_bits_of_a_session(
    architecture: str, threads: int, programs: Path
) -> None:
    folder, out = programs / architecture, programs / f"{architecture}-native"
    if not out.exists():
        export(artefact_of(architecture, folder), out, "native")
    session = ssmc.load(folder, "cpu", "cpu").session(1)
    sequences = [[tokens(1, length)[0].tolist() for length in calls] for calls in LENGTHS]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(out), str(threads)],
        input=json.dumps(sequences).encode(),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    expected = []
    for calls in sequences:
        session.reset()
        for ids in calls:
            for piece in torch.tensor([ids]).split(pieces_of(len(ids)), 1):
                logits = session.prefill(piece)[0].clone()
            expected.append(logits)
    found = torch.frombuffer(bytearray(done.stdout), dtype=torch.float32)
    assert torch.equal(found.view(len(expected), -1), torch.stack(expected))
    assert torch.stack(expected).isfinite().all()


def test_text(call: Call, demo: Path, demo_folder: Path) -> None:
    words = ("--prompt", "The old man and", "-n", "20")
    ours, theirs = call("run", demo, *words), call("generate", demo_folder, *words)
    assert ours.code == 0
    assert ours.out == theirs.out
    found = call("run", demo, *words, "--json").json
    assert found["text"] == ours.out.removeprefix("The old man and").removesuffix("\n")
    assert len(found["tokens"]) == 20
    stopped = call("run", demo, *words, "--stop", found["text"][5:9], "--json").json
    assert stopped["text"] == found["text"][:5]
    assert stopped["ended"] == "stop"


def test_draws_are_those_of_the_seed(demo: Path) -> None:
    model = load(demo, 1)
    ids = model.tokenizer().encode("The", add_special_tokens=False).ids

    def drawn(**given: float) -> list[int]:
        return list(model.generate(ids, 12, Sampling(**given)))  # type: ignore[arg-type]

    greedy = drawn()
    assert drawn(temperature=1.0, top_k=1, seed=3) == greedy
    assert drawn(temperature=1.0, top_p=1e-9, seed=3) == greedy
    assert drawn(temperature=1.0, seed=3) == drawn(temperature=1.0, seed=3)
    assert len({tuple(drawn(temperature=1.0, seed=seed)) for seed in range(4)}) > 1


def test_draws_follow_the_probabilities() -> None:
    scores = torch.tensor([0.0, 1.0, 2.0, -1.0])
    given = memoryview(scores.numpy()).cast("B").cast("f")
    choose = Sampling(temperature=2.0, top_k=3, seed=1).drawing()
    counts = torch.bincount(torch.tensor([choose(given) for _ in range(4000)]), minlength=4)
    shares = (scores[:3] / 2).softmax(0)
    bound = 5 * (shares * (1 - shares) / 4000).sqrt()  # five standard deviations
    assert ((counts[:3] / 4000 - shares).abs() < bound).all()
    assert counts[3] == 0


def test_what_is_not_run(call: Call, demo: Path, demo_folder: Path, tmp_path: Path) -> None:
    for words in (("run", demo_folder, "--prompt", "a"), ("run", tmp_path, "--prompt", "a")):
        ended = call(*words)
        assert ended.code == 2
        assert "is no native program" in ended.error
    ended = call("generate", demo, "--prompt", "a")
    assert ended.code == 2
    assert f"ssmc run {demo}" in ended.error
    assert "the prompt is empty" in call("run", demo, "--prompt", "").error
    assert "out of range" in call("run", demo, "--prompt", "a", "--temperature", "-1").error
    model = load(demo, 1)
    with pytest.raises(UsageError, match="nothing was run"):
        model.likeliest()
    with pytest.raises(UsageError, match="there is no token 100000"):
        model.prefill([1, 100000])
    with pytest.raises(UsageError, match="prompt is empty"):
        model.prefill([])


def test_caches_have_room_for_so_many_tokens(programs: Path) -> None:
    folder, out = programs / "llama", programs / "llama-native"
    if not out.exists():
        export(artefact_of("llama", folder), out, "native")
    model = load(out, 1)
    model.prefill([1] * 2047)
    model.step(1)
    with pytest.raises(UsageError, match=r"2049 tokens.* have room for 2048"):
        model.step(1)
    model.reset()
    model.step(1)


def test_what_has_no_kernel_is_named(tmp_path: Path) -> None:
    compiled = ssmc.compile(build("mamba"), passes="", scheme="none", calibration=tokens(2, 17))
    with pytest.raises(UnsupportedError, match=r"no kernel for .*linear"):
        export(compiled.save(tmp_path / "float"), tmp_path / "out", "native")
    assert not (tmp_path / "out").exists()


def damage(program: Path, out: Path, name: str, data: bytes) -> NativeModel:
    shutil.copytree(program, out)
    (out / name).write_bytes(data)
    return load(out, 1)


@pytest.mark.parametrize("name", [PROGRAM, TENSORS, CODE])
def test_a_damaged_file_is_named(demo: Path, tmp_path: Path, name: str) -> None:
    whole = (demo / name).read_bytes()
    for i, data in enumerate((whole[:-7], b"", b"{", b"\x00" * 64)):
        with pytest.raises(ArtefactError, match=name):
            damage(demo, tmp_path / str(i), name, data)
    (tmp_path / "0" / name).unlink()
    with pytest.raises(ArtefactError, match=f"{name} cannot be read"):
        load(tmp_path / "0", 1)


def test_another_processor_is_refused(demo: Path, tmp_path: Path) -> None:
    about = json.loads((demo / PROGRAM).read_text())
    about["processor"]["features"].append("matrix-of-tomorrow")
    with pytest.raises(DeviceError, match="this one has no matrix-of-tomorrow"):
        damage(demo, tmp_path / "out", PROGRAM, json.dumps(about).encode())


def test_threads_end_with_their_model(demo: Path) -> None:
    before = threading.active_count()
    model = load(demo, 3)
    model.prefill([1] * 40)
    assert threading.active_count() == before + 2
    del model
    assert threading.active_count() == before
