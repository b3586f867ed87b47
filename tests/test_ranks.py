"""Several processes that share the batches: what they make is what one makes, byte by byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import COMMAND, ended, start
from tiny import EOS, TEXT, write_model

import ssmc
from ssmc.cli.target import Target, open_target
from ssmc.core.journal import MANIFEST
from ssmc.core.ranks import Ranks
from ssmc.core.saved import Saved
from ssmc.corpus import read_texts
from ssmc.evaluate import LastWord, last_word, perplexity

COUNT = 2
PASSES = "hadamard,smooth,percentile{p=0.99},gptq{asymmetric=true,sweeps=1}"
TRAINED = "reconstruct{scales=tensor,steps=16,length=15,batch=3,patience=9}"
COMPILED: dict[str, dict[str, Any]] = {
    "mamba": {"samples": 7, "length": 24, "passes": PASSES, "scheme": "w4a16"},
    "jamba": {"samples": 7, "length": 24, "passes": PASSES, "scheme": "w4a16"},
    "mamba2": {"samples": 11, "length": 16, "passes": TRAINED, "scheme": "none"},
}
"""What is made of a model of each architecture."""


def files(folder: Path) -> dict[str, bytes]:
    """What an artefact consists of."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


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
found = []
for folder, options in json.loads(sys.argv[1]).items():
    made = ssmc.compile(folder, calibration=f"{folder}/text.txt", **options)
    made.save(f"{folder}-{ranks.number}-of-{ranks.count}")
    windows = torch.arange(7 * 20).view(7, 20) % 30
    found.append(perplexity(made, windows, batch=2, ranks=ranks).perplexity)
print(json.dumps(found))
"""


def test_they_make_what_one_makes(tmp_path: Path) -> None:
    models = {str(write_model(tmp_path / name, name)): how for name, how in COMPILED.items()}
    given = json.dumps(models)
    said = ended([*start(1, SHARED, given), *start(COUNT, SHARED, given)])
    assert all(found == said[0] for found in said)
    for folder in models:
        whole = files(Path(f"{folder}-0-of-1"))
        for rank in range(COUNT):
            assert files(Path(f"{folder}-{rank}-of-{COUNT}")) == whole
    report = json.loads((tmp_path / "mamba2-0-of-1" / "report.json").read_text())
    trained = next(p for p in report["passes"] if p["name"] == "reconstruct")
    assert len(trained["matched"]) == 2


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


@pytest.mark.parametrize(
    ("passes", "savings"),
    [("hadamard,percentile,gptq", 3), ("reconstruct{steps=4,length=15},percentile", 3)],
)
def test_a_process_that_dies_ends_the_run_with_one_message_and_leaves_progress(
    tmp_path: Path, passes: str, savings: int
) -> None:
    model, out = write_model(tmp_path / "model"), tmp_path / "out"
    command = [
        "compile", str(model), "--calibration", str(model / "text.txt"), "--samples", "12",
        "--length", "16", "--passes", passes,
    ]  # fmt: skip
    processes = start(2, DYING, str(savings), *command, "-o", str(out))
    told = [process.communicate(timeout=120)[1] for process in processes]
    assert processes[1].returncode == -9
    assert processes[0].returncode == 1, told[0]
    messages = [line for text in told for line in text.splitlines() if line.startswith("error:")]
    assert len(messages) == 1, told
    assert "another process of this run has ended" in messages[0]
    assert "--resume" in told[0]
    assert not out.exists()
    assert (tmp_path / "out.progress" / MANIFEST).exists()

    ended(start(2, DYING, "1000", *command, "-o", str(out), "--resume"))
    assert not (tmp_path / "out.progress").exists()
    given = {"samples": 12, "length": 16, "passes": passes}
    ssmc.compile(str(model), calibration=model / "text.txt", **given).save(tmp_path / "alone")
    assert files(out) == files(tmp_path / "alone")


@pytest.fixture(scope="module")
def target(tiny_folder: Path) -> Target:
    return open_target(str(tiny_folder), device="cpu")


@pytest.fixture(scope="module")
def passages(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of many lengths; every third ends with the word that the model says."""
    words, lines = TEXT.split(), []
    for i in range(37):
        before = words[i : i + 3 + i * i % 41]
        ids = [EOS, *(int(word[1:]) for word in before)]
        said = int(target.run(torch.tensor([ids]))[0][0, -1].argmax())
        text = " ".join([*before, f"w{said if i % 3 == 0 else said + 1}"])
        lines.append(json.dumps({"text": text}))
    file = tmp_path_factory.mktemp("passages") / "passages.jsonl"
    file.write_text("\n".join(lines))
    return file


def asked(folder: str, passages: Path) -> list[str]:
    text = ["--text", f"{folder}/text.txt", "--window", "20", "--limit", "3"]
    return ["eval", folder, *text, "--last-word", str(passages), "--json"]


def test_last_words_are_those_of_one_process_and_said_once(target: Target, passages: Path) -> None:
    first, second = ended(start(2, COMMAND, *asked(target.name, passages)))
    assert json.loads(first)["last_word"] == {"accuracy": 13 / 37, "passages": 37}
    assert second == ""
    tokenizer, eos = target.encoder()
    assert last_word(target.run, tokenizer, read_texts(passages), eos) == LastWord(13 / 37, 37)


FAILING = """
import importlib, os
from ssmc.errors import UsageError

module = importlib.import_module("ssmc.evaluate.last_word")

def fail(*_):
    raise UsageError("cannot be read", hint="mend it")

if os.environ["RANK"] == "1":
    module._count_right = fail
from ssmc.cli.main import main
main()
"""


def test_one_that_fails_ends_all_with_its_message(target: Target, passages: Path) -> None:
    processes = start(2, FAILING, *asked(target.name, passages))
    told = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [1, 2]
    assert [out for out, _ in told] == ["", ""]
    assert "error" not in told[0][1]
    assert told[1][1] == "error: cannot be read\n  mend it\n"


def test_alone_everything_is_ones_own() -> None:
    ranks = Ranks()
    assert list(ranks.own(range(5))) == [0, 1, 2, 3, 4]
    assert list(ranks.deal(range(5))) == [0, 1, 2, 3, 4]
    part = Saved({"a": 1}, {"t": torch.ones(2)})
    assert ranks.gather(part) == [part]
    assert ranks.map(lambda item: Saved({"item": item}), "ab") == [
        Saved({"item": "a"}),
        Saved({"item": "b"}),
    ]
    assert ranks.agree(False) is False
    assert ranks.add_up(torch.zeros(2), [torch.ones(2), torch.ones(2)]).tolist() == [2, 2]


@pytest.mark.parametrize(("items", "count"), [(7, 3), (2, 5), (0, 2), (64, 8)])
def test_each_takes_neighbours_or_is_dealt_to_and_all_take_everything(
    items: int, count: int
) -> None:
    parts, hands = [], []
    for number in range(count):
        ranks = Ranks()
        ranks.number, ranks.count = number, count
        parts.append(list(ranks.own(range(items))))
        hands.append(list(ranks.deal(range(items))))
    assert [item for part in parts for item in part] == list(range(items))
    assert sorted(item for hand in hands for item in hand) == list(range(items))
    for found in (parts, hands):
        assert max(map(len, found)) - min(map(len, found)) <= 1


def test_perplexity_alone_is_as_ever() -> None:
    def model(ids: torch.Tensor, states: Any = None) -> Any:
        return torch.nn.functional.one_hot(ids, 9).float(), {}

    windows = torch.arange(40).view(5, 8) % 9
    found = {perplexity(model, windows, batch=batch).perplexity for batch in (1, 2, 5)}  # type: ignore[arg-type]
    assert len(found) == 1
