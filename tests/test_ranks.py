"""Several processes that share the batches: what they make is what one makes, byte by byte."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_model

import ssmc
from ssmc.core.journal import MANIFEST
from ssmc.core.ranks import Ranks
from ssmc.core.saved import Saved
from ssmc.evaluate import perplexity

COUNT = 2
ARCHITECTURES = ("mamba", "jamba")
PASSES = "hadamard,smooth,percentile{p=0.99},gptq{asymmetric=true,sweeps=1}"


def files(folder: Path) -> dict[str, bytes]:
    """What an artefact consists of."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def start(count: int, script: str, *args: str, **more: Any) -> list[subprocess.Popen[str]]:
    """Processes as torchrun starts them, each with the script."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    world = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, "-c", script, *args],
            env={**os.environ, **world, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more,
        )
        for rank in range(count)
    ]  # fmt: skip


SHARED = """
import json, sys
import torch
import ssmc
import ssmc.compiler
from ssmc.core.ranks import join
from ssmc.evaluate import perplexity

torch.set_num_threads(1)
ssmc.compiler.CALIBRATION_BATCH = 2
ranks = join()
given = json.loads(sys.argv[1])
found = []
for folder in given["models"]:
    made = ssmc.compile(folder, calibration=f"{folder}/text.txt", **given["options"])
    made.save(f"{folder}-{ranks.number}-of-{ranks.count}")
    windows = torch.arange(7 * 20).view(7, 20) % 30
    found.append(perplexity(made, windows, batch=2, ranks=ranks).perplexity)
print(json.dumps(found))
"""


def test_they_make_what_one_makes(tmp_path: Path) -> None:
    models = [str(write_model(tmp_path / name, name)) for name in ARCHITECTURES]
    options = {"samples": 7, "length": 24, "passes": PASSES, "scheme": "w4a16"}
    given = json.dumps({"models": models, "options": options})
    alone = start(1, SHARED, given)
    together = start(COUNT, SHARED, given)
    said = []
    for process in (*alone, *together):
        out, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        said.append(json.loads(out))
    assert all(found == said[0] for found in said)
    for folder in models:
        whole = files(Path(f"{folder}-0-of-1"))
        for rank in range(COUNT):
            assert files(Path(f"{folder}-{rank}-of-{COUNT}")) == whole


def test_each_has_its_share_of_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = """
import os, torch
from ssmc.core.ranks import join, leave

os.sched_getaffinity = lambda process: range(7)
join()
print(torch.get_num_threads())
leave()
"""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(COUNT))
    said = [process.communicate(timeout=120) for process in start(COUNT, threads)]
    assert [out for out, _ in said] == ["3\n", "3\n"], said


DYING = """
import os, signal, sys
import torch
from ssmc.core import journal

torch.set_num_threads(1)
journal.INTERVAL = 0.0
save, left = journal.Log.save, [int(sys.argv.pop(1))]

def saved(self, *args):
    save(self, *args)
    left[0] -= 1
    if not left[0] and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)

journal.Log.save = saved
from ssmc.cli.main import main
main()
"""


def test_a_process_that_dies_ends_the_run_with_one_message_and_leaves_progress(
    tmp_path: Path,
) -> None:
    model, out = write_model(tmp_path / "model"), tmp_path / "out"
    command = [
        "compile", str(model), "--calibration", str(model / "text.txt"), "--samples", "12",
        "--length", "16", "--passes", "hadamard,percentile,gptq",
    ]  # fmt: skip
    processes = start(2, DYING, "3", *command, "-o", str(out))
    told = [process.communicate(timeout=120)[1] for process in processes]
    assert processes[1].returncode == -9
    assert processes[0].returncode == 1, told[0]
    messages = [line for text in told for line in text.splitlines() if line.startswith("error:")]
    assert len(messages) == 1, told
    assert "another process of this run has ended" in messages[0]
    assert "--resume" in told[0]
    assert not out.exists()
    assert (tmp_path / "out.progress" / MANIFEST).exists()

    processes = start(2, DYING, "1000", *command, "-o", str(out), "--resume")
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert not (tmp_path / "out.progress").exists()
    given = {"samples": 12, "length": 16, "passes": "hadamard,percentile,gptq"}
    ssmc.compile(str(model), calibration=model / "text.txt", **given).save(tmp_path / "alone")
    assert files(out) == files(tmp_path / "alone")


def test_alone_everything_is_ones_own() -> None:
    ranks = Ranks()
    assert list(ranks.own(range(5))) == [0, 1, 2, 3, 4]
    part = Saved({"a": 1}, {"t": torch.ones(2)})
    assert ranks.gather(part) == [part]
    assert ranks.agree(False) is False
    assert ranks.add_up(torch.zeros(2), [torch.ones(2), torch.ones(2)]).tolist() == [2, 2]


@pytest.mark.parametrize(("items", "count"), [(7, 3), (2, 5), (0, 2), (64, 8)])
def test_each_takes_neighbours_and_all_take_everything(items: int, count: int) -> None:
    parts = []
    for number in range(count):
        ranks = Ranks()
        ranks.number, ranks.count = number, count
        parts.append(list(ranks.own(range(items))))
    assert [item for part in parts for item in part] == list(range(items))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_perplexity_alone_is_as_ever() -> None:
    def model(ids: torch.Tensor, states: Any = None) -> Any:
        return torch.nn.functional.one_hot(ids, 9).float(), {}

    windows = torch.arange(40).view(5, 8) % 9
    found = {perplexity(model, windows, batch=batch).perplexity for batch in (1, 2, 5)}  # type: ignore[arg-type]
    assert len(found) == 1
