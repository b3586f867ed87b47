"""The progress of a compilation on disk, so that one that was killed goes on where it was.

Only what takes long is kept: what a pass has measured or chosen so far, where it stands, and what
its checks found when it ended. All else is done again, and gives the same, since passes are
deterministic. A folder holds

    progress.json         what is compiled, and the files of each pass
    NNNNNN-R.safetensors  tensors of process R, written and synced before progress.json names them
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssmc.core.disk import sync
from ssmc.core.graph import Graph
from ssmc.core.ranks import Ranks
from ssmc.core.saved import Saved, apart
from ssmc.errors import UsageError

MANIFEST = "progress.json"
SCHEMA = 1
_NUMBERED = re.compile(r"\d{6}-\d+\.safetensors$")
INTERVAL = 30.0
"""Seconds of work between two savings, at least: what a kill may cost."""


class Journal:
    """The progress of one compilation in `folder`.

    `identity` says what is compiled, and how: JSON data by topic. With `resume`, the folder may
    hold the progress of an earlier run of the same, which is taken over; UsageError naming the
    topic where it is another's, or where the folder is damaged. Without, it is emptied first.
    Of several processes the first writes the manifest, when the data of all are there.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        *,
        resume: bool,
        ranks: Ranks | None = None,
    ) -> None:
        self.folder, self.ranks = folder, ranks or Ranks()
        self.identity = json.loads(json.dumps(identity))
        self.passes: dict[str, dict[str, Any]] = {}
        self.records: dict[str, dict[str, Any]] = {}
        self.number = 0
        self.last = time.monotonic()
        known = resume and (folder / MANIFEST).is_file()
        if not known and self.first:
            self._check_ours()
            self.remove()
        if self.ranks.agree(known):
            self._take_over()
        if self.first:
            self._sweep()

    @property
    def published(self) -> bool:
        """Whether there is anything to go on from."""
        return (self.folder / MANIFEST).is_file()

    @property
    def first(self) -> bool:
        """Whether this is the process that writes the manifest."""
        return self.ranks.number == 0

    def _check_ours(self) -> None:
        names = [path.name for path in self.folder.iterdir()] if self.folder.exists() else []
        foreign = [
            n for n in sorted(names) if not n.startswith(MANIFEST) and not _NUMBERED.match(n)
        ]
        if foreign:
            raise UsageError(
                f"{self.folder} is where progress is kept, and holds '{foreign[0]}'",
                hint="move it away, or name another output folder",
            )

    def _take_over(self) -> None:
        try:
            found = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
            self.passes, self.number = found["passes"], found["number"]
            self.records = found["records"]
            identity = dict(found["identity"])
        except (ValueError, KeyError, TypeError):
            raise self._damaged() from None
        for topic in self.identity:
            if identity.get(topic) != self.identity[topic]:
                raise UsageError(
                    f"{self.folder} holds the progress of another {topic}: "
                    f"{_difference(identity.get(topic), self.identity[topic])}",
                    hint="leave --resume out to begin anew, or name another output folder",
                )

    def _damaged(self) -> UsageError:
        return UsageError(
            f"the progress in {self.folder} is damaged", hint="leave --resume out to begin anew"
        )

    def ended(self, name: str, record: Mapping[str, Any]) -> None:
        """Keep what the pass called `name` did: it need not be checked again."""
        self.records[name] = dict(record)
        if self.ranks.agree(time.monotonic() - self.last >= INTERVAL):
            self.publish()

    def write(self, tensors: Mapping[str, Tensor]) -> str:
        """A new file of tensors, whole on the disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{self.number:06}-{self.ranks.number}.safetensors"
        self.number += 1
        save_file(apart(tensors), self.folder / name)
        sync(self.folder / name)
        return name

    def read(self, name: str) -> dict[str, Tensor]:
        """The tensors of a file."""
        try:
            return load_file(self.folder / name)
        except (OSError, SafetensorError):
            raise self._damaged() from None

    def publish(self) -> None:
        """Let the manifest name what has been written, at once; drop what it names no more."""
        self.last = time.monotonic()
        if not self.first:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        data = {
            "schema": SCHEMA,
            "identity": self.identity,
            "passes": self.passes,
            "records": self.records,
            "number": self.number,
        }
        part = self.folder / f"{MANIFEST}.part"
        part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        sync(part)
        part.replace(self.folder / MANIFEST)
        sync(self.folder)
        self._sweep()

    def _sweep(self) -> None:
        named = {name for entry in self.passes.values() for name in _files(entry)}
        for path in self.folder.glob("*.safetensors"):
            if path.name not in named:
                path.unlink()

    def remove(self) -> None:
        """Delete what is kept, and the folder."""
        if not self.first:
            return
        for path in (*self.folder.glob(f"{MANIFEST}*"), *self.folder.glob("*.safetensors")):
            path.unlink()
        if self.folder.exists():
            self.folder.rmdir()


class Log:
    """One pass's part of a journal, under a name that is its own; without a journal, nothing."""

    def __init__(self, journal: Journal | None = None, name: str = "") -> None:
        self.journal, self.name = journal, name
        self.known: dict[str, Tensor] = {}

    def record(self) -> Mapping[str, Any] | None:
        """What the pass did and what its checks found, if it has ended before."""
        return self.journal.records.get(self.name) if self.journal else None

    def ended(self, record: Mapping[str, Any]) -> None:
        """Keep that."""
        if self.journal is not None:
            self.journal.ended(self.name, record)

    def restore(self, g: Graph) -> Saved | None:
        """Where the pass stood, with what it had put into `g` until then; None at its beginning.

        To be asked before the pass changes `g`.
        """
        entry = self.journal.passes.get(self.name) if self.journal else None
        if self.journal is not None and entry is not None:
            for file in entry["params"]:
                values = self.journal.read(file)
                for node in g.nodes:
                    if node.op == "get_attr" and node.target in values:
                        g.set_param(node, values[str(node.target)].to(g.param(node).device))
            g.matched[:], g.skipped[:] = entry["matched"], entry["skipped"]
            g.notes[:] = entry["notes"]
        self.known = g.params()
        if self.journal is None or entry is None:
            return None
        number = self.journal.ranks.number
        return Saved(entry["abouts"][number], self.journal.read(entry["positions"][number]))

    def due(self) -> bool:
        """Whether so much was done since the last saving that it is worth another.

        To be asked by all processes of a run, which get one answer.
        """
        journal = self.journal
        return journal is not None and journal.ranks.agree(
            time.monotonic() - journal.last >= INTERVAL
        )

    def save(self, g: Graph, saved: Saved) -> None:
        """Keep where the pass stands: `saved`, and the parameters it has changed in `g`.

        All processes of a run are to call it, having done the same.
        """
        journal = self.journal
        if journal is None:
            return
        now = g.params()
        changed = {name: t for name, t in now.items() if self.known.get(name) is not t}
        params = [journal.write(changed)] if changed and journal.first else []
        position = journal.write(saved.tensors)
        mine = {"params": params, "position": position, "number": journal.number}
        files = [part.about for part in journal.ranks.gather(Saved(mine | {"about": saved.about}))]
        journal.number = max(entry["number"] for entry in files)
        before = journal.passes.get(self.name, {"params": []})
        journal.passes[self.name] = {
            "params": before["params"] + files[0]["params"],
            "positions": [entry["position"] for entry in files],
            "abouts": [entry["about"] for entry in files],
            "matched": list(g.matched),
            "skipped": list(g.skipped),
            "notes": list(g.notes),
        }
        journal.publish()
        self.known = now


def _files(entry: Mapping[str, Any]) -> Iterable[str]:
    return (*entry["params"], *entry["positions"])


def _difference(old: Any, new: Any) -> str:
    """The first thing in which two JSON values differ, as `old, here new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *new]:
            if old.get(key) != new.get(key):
                return f"{key} {_difference(old.get(key), new.get(key))}"
    return f"{json.dumps(old)}, here {json.dumps(new)}"
